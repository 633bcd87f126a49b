"""Reports errors in the input as one clear line."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

TRACEBACK_ENV_VAR = "MMRLA_TRACEBACK"


# What constructors and readers raise about their input.
INPUT_ERRORS = (ValueError, TypeError, KeyError, AssertionError, OSError, ImportError)


_IN_WORKER = "Original Traceback (most recent call last)"


@contextmanager
def exit_with_message(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors in the input into one line on stderr and exit status 2.

    ``MMRLA_TRACEBACK=1`` shows the traceback.

    Args:
        *kinds: Exceptions to catch; by default all that constructors and readers raise about their
            input, which is suitable before a run starts.

    Raises:
        SystemExit: With status 2, in place of the exception.
    """
    caught = kinds or INPUT_ERRORS
    try:
        yield
    except BrokenPipeError:  # an OSError, but of the output: see mmrla.commands.pipes
        raise
    except caught as error:
        if os.environ.get(TRACEBACK_ENV_VAR):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        message = str(text) or type(error).__name__
        if _IN_WORKER in message:
            # A dataloader's process puts its traceback in front of the message.
            message = message.strip().splitlines()[-1]
        print(f"error: {message}\n({TRACEBACK_ENV_VAR}=1 shows the traceback)", file=sys.stderr)
        sys.exit(2)


def require_at_least(args: Namespace, **least: int) -> None:
    """Check options of a command; those that are None pass.

    Raises:
        ValueError: One is below its least value.
    """
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least {bound}, got {value}")


reporting_errors = exit_with_message  # its name in earlier versions
