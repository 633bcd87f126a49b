"""Atomic writing of checkpoints, safe against kills and full disks, and recovery."""

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
    """Write a file so that its name always has either the old content or all of the new.

    The data are written to a temporary file in the same folder, flushed to disk, and then renamed.

    Raises:
        CheckpointError: It cannot be written, for example because the disk is full. An existing
            file is unchanged, and the temporary file is removed.
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
    """Flush a rename to disk; not every file system supports this for folders."""
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
    """Remove temporary files that killed writers left in a folder, and return them."""
    found = [p for p in Path(folder).glob(".*.mmrla-tmp") if _TEMPORARY.fullmatch(p.name)]
    for path in found:
        path.unlink(missing_ok=True)
    return found


@register_backend(BACKEND)
class AtomicLocalBackend(LocalBackend):
    """mmengine's backend for local files, with atomic writes."""

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
        """In this context, files are only removed after everything has been written.

        Args:
            written: Files to keep although their removal was requested, because they have new
                content; read at the end.
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
    """A description of a checkpoint file's damage, found without running code from it.

    torch's files are zip archives with a directory at the end and a checksum for every part, so
    truncation and flipped bits are both detected.
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
    """The checkpoint to resume from: the one in ``last_checkpoint``, or the newest intact one.

    Damaged ones are skipped with a warning that names them. The file in ``last_checkpoint`` is also
    searched in ``work_dir``, which may have moved.

    Raises:
        CheckpointError: All checkpoints are damaged.
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
