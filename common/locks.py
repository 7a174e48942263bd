"""The right to write: one process at a time holds a lock file; the system frees it with the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import UserError
from common.files import explain_disk_errors


@contextmanager
def file_lock(path: Path, *, timeout: float = -1.0) -> Iterator[bool]:
    """Hold the lock of a file; yields False where another process holds it.

    The lock file stays. Whoever removes it does so while he holds the lock: one who waits sees that it is gone
    and takes the lock of the new file.

    Args:
        path: the lock file; its folder is made.
        timeout: seconds to wait for the other process; below 0: as long as it takes.

    Raises:
        UserError: the file system has no locks, or its disk cannot be written.
    """
    # A soft lock, filelock's way out where flock is missing, would outlive a killed process.
    lock = FileLock(path, timeout=timeout, fallback_to_soft=False)
    try:
        with explain_disk_errors(path):
            lock.acquire()
    except Timeout:
        yield False
        return
    except OSError as error:
        if error.filename is not None:  # of the file; whatever flock itself answers, there is no lock to be had
            raise
        raise UserError(
            f"{path}: this file system has no file locks ({error.strerror}), so two processes could write the same "
            "files. Mount it with locks (Lustre: `-o flock`; NFS: with its lock service), or work on another file "
            "system and copy what is finished."
        ) from error
    try:
        yield True
    finally:
        lock.release()
