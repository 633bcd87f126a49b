"""Handles a closed output pipe, as in ``mmrla list | head -1``."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SIGPIPE_STATUS = 141  # what a shell reports of other programs that end so


def _reader_has_left() -> bool:
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


@contextmanager
def ends_with_its_reader() -> Iterator[None]:
    """Exit without a traceback when standard output is closed; also a decorator.

    Raises:
        SystemExit: With status 141, instead of BrokenPipeError. Errors of other pipes, such as a
            dataloader's, are raised.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # or it would fail when Python ends, past everybody
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        # What is left in the buffers has to go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(SIGPIPE_STATUS) from None
