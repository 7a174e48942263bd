"""Files: written so that a reader sees the whole of one or nothing of it, and the hashes they are compared by."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from common.errors import UserError

TEMPORARY_MARK = ".tmp-"


@contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space", "cannot write" and "cannot read" into a UserError that names the place and what to do."""
    try:
        yield
    except Exception as raised:
        error = _disk_error(raised)
        if error is None or isinstance(raised, UserError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            raise UserError(
                f"{path}: the disk is full ({free / 1e6:.0f} MB free). "
                "Make room and run the same command again: what is finished is kept."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            if error.filename is not None and not _is_place(os.fsdecode(error.filename), path):
                raise UserError(
                    f"{error.filename}: cannot be read ({error.strerror}). "
                    "Make it readable and run the same command again."
                ) from error
            raise UserError(
                f"{path}: cannot be written ({error.strerror}). "
                "Make the folder writable, or choose another, and run the same command again."
            ) from error
        if error.errno == errno.EFBIG:
            raise UserError(
                f"{path}: the system allows no file of that size ({error.strerror}). Raise the limit (`ulimit -f`) or "
                "choose another file system, and run the same command again: what is finished is kept."
            ) from error
        if error.errno == errno.EIO:
            raise UserError(
                f"{error.filename or path}: the disk fails ({error.strerror}). "
                "Mend or change it and run the same command again: what is finished is kept."
            ) from error
        if error.errno == errno.ENOENT and not path.parent.exists():
            raise UserError(
                f"{path}: its folder {path.parent} does not exist. Make it, or give another place."
            ) from error
        raise


def _disk_error(raised: BaseException) -> OSError | None:
    """Return the OSError that was raised, or that led to it: libraries close their writers and fail again there."""
    found: BaseException | None = raised
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found


def _is_place(named: str, path: Path) -> bool:
    """Tell whether a name that the system gave is of what is written: `path`, above it, below it, its temporary."""
    found, place = Path(named).absolute(), path.absolute()
    temporary = found.parent == place.parent and found.name.startswith(place.name + TEMPORARY_MARK)
    return temporary or found.is_relative_to(place) or place.is_relative_to(found)


@contextmanager
def open_atomic(path: Path, *, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under `path`, whole and synced, only if the block ends well.

    Args:
        path: the final name.
        temporary: the name until then, in the same folder. By default one of this process alone; a writer who
            holds a lock gives a fixed one, so that what a killed writer left is overwritten.

    Raises:
        UserError: the disk is full or failing, or the place cannot be written.
    """
    temporary = temporary or path.with_name(f"{path.name}{TEMPORARY_MARK}{os.getpid()}")
    try:
        with explain_disk_errors(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, write: Callable[[BinaryIO], object] | bytes) -> None:
    """Write `path` at once, from bytes or by a function that is given the open file."""
    with open_atomic(path) as file:
        if isinstance(write, bytes):
            file.write(write)
        else:
            write(file)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed writer left half-written in `folder`."""
    for path in folder.glob(f"*{TEMPORARY_MARK}*"):
        path.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_text(size: float) -> str:
    """Return a number of bytes in GB, below one in MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def canonical_json(value: object) -> bytes:
    """Return the one JSON text of a value: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def json_sha256(value: object) -> str:
    """Return the sha256, in hex, of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
