"""Checkpoints that a kill or a full disk cannot damage, and finding the newest intact one."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import print_log

from mmrla.checkpoints.files import CheckpointError, load_file

BACKEND = "mmrla_atomic"
_NUMBERED = re.compile(r"(epoch|iter)_\d+\.pth")
_TEMPORARY = re.compile(r"\..+\.\d+\.mmrla-tmp")
_MIB = 2**20


def write_atomically(data: bytes, path: str | Path) -> None:
    """Write a file so that at every moment its name shows the old content or all of the new.

    The data go to a temporary file in the same folder, onto the disk, and only then under the name.

    Args:
        data: The content.
        path: A local file; its folder is made where it is not there.

    Raises:
        CheckpointError: It cannot be written, such as for want of space. What had the name before
            is as it was, and the temporary file is gone.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.mmrla-tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise CheckpointError(_cannot_write(target, len(data), error)) from error


def _sync_folder(folder: Path) -> None:
    """Put a rename on the disk; not every file system lets a folder be synchronised."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cannot_write(target: Path, size: int, error: OSError) -> str:
    message = f"cannot write {target.absolute()}: {error.strerror or error}"
    with suppress(OSError):
        free = shutil.disk_usage(target.parent).free / _MIB
        message += f" ({size / _MIB:.1f} MiB to write, {free:.1f} MiB free in {target.parent})"
    return f"{message}. What was saved before is intact: make room, then go on with --resume"


def remove_temporaries(folder: str | Path) -> list[Path]:
    """Remove what writers that were killed have left in a folder.

    Returns:
        What was removed.
    """
    found = [p for p in Path(folder).glob(".*.mmrla-tmp") if _TEMPORARY.fullmatch(p.name)]
    for path in found:
        path.unlink(missing_ok=True)
    return found


@register_backend(BACKEND)
class AtomicLocalBackend(LocalBackend):
    """mmengine's backend for local files, whose writes are all or nothing."""

    def __init__(self) -> None:
        self._postponed: list[str] | None = None

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """As :func:`write_atomically`."""
        write_atomically(bytes(obj), filepath)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """As :func:`write_atomically`."""
        write_atomically(obj.encode(encoding), filepath)

    def remove(self, filepath: str | Path) -> None:
        """Remove a file, inside :meth:`removing_last` at its end."""
        if self._postponed is None:
            super().remove(filepath)
        else:
            self._postponed.append(str(filepath))

    @contextmanager
    def removing_last(self, written: list[str]) -> Iterator[None]:
        """Inside, files are removed only once everything has been written.

        Args:
            written: Files that stay though someone asked to remove them, read at the end: they
                have new content.
        """
        outer, self._postponed = self._postponed, []
        try:
            yield
        except BaseException:
            self._postponed = outer
            raise
        postponed, self._postponed = self._postponed, outer
        for path in postponed:
            if path not in written:
                self.remove(path)


def damage(path: str | Path) -> str | None:
    """What is wrong with a checkpoint file, found without running code from it.

    torch's files are zip archives, whose directory is written last and which carry a checksum of
    every part, so a truncated file and a flipped bit both show.

    Args:
        path: A local file.

    Returns:
        A few words, or None for an intact file.
    """
    path = Path(path)
    if not path.is_file():
        return "no such file"
    try:
        with path.open("rb") as file:
            head = file.read(2)
        if not head:
            return "the file is empty"
        if head == b"PK":
            with zipfile.ZipFile(path) as archive:
                part = archive.testzip()
            return f"{part} does not match its checksum" if part else None
    except Exception as error:  # a damaged archive can raise anything
        return f"truncated or damaged ({error})"
    try:
        load_file(path)  # torch's format before 1.6
    except CheckpointError as error:
        message = str(error).removeprefix(f"{path}: ")
        return None if "objects besides tensors" in message else message
    return None


def latest_intact(work_dir: str | Path) -> str | None:
    """The checkpoint to go on from: what ``last_checkpoint`` names, or the newest intact one.

    A damaged one is passed over with a warning that names it. The file that ``last_checkpoint``
    names is looked for in ``work_dir`` too, which may have moved.

    Args:
        work_dir: Of the run.

    Returns:
        Its path, None where there is no checkpoint at all.

    Raises:
        CheckpointError: There are some and all are damaged.
    """
    folder = Path(work_dir)
    named = folder / "last_checkpoint"
    candidates = []
    if named.is_file():
        text = named.read_bytes().decode(errors="replace").strip("\0 \n")
        if "://" in text:
            return text
        if text:
            moved = folder / Path(text).name
            candidates.append(Path(text) if Path(text).is_file() else moved)
    numbered = [p for p in folder.glob("*.pth") if _NUMBERED.fullmatch(p.name)]
    newest = sorted(numbered, key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True)
    known = {p.absolute() for p in candidates}
    candidates += [p for p in newest if p.absolute() not in known]
    bad: list[str] = []
    for path in candidates:
        wrong = damage(path)
        if wrong is None:
            if bad:
                print_log(
                    f"checkpoint passed over: {'; '.join(bad)}. Going on from {path.absolute()}",
                    logger="current",
                    level=30,
                )
            return str(path)
        bad.append(f"{path.absolute()}: {wrong}")
    if bad:
        raise CheckpointError(f"no intact checkpoint to resume from: {'; '.join(bad)}")
    return None
