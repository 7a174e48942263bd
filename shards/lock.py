"""One packer at a time in an output folder, its workers included."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError

_LOCK, _WORKERS_LOCK = "lock", "workers.lock"
_ORPHANS_END_WITHIN = 60.0  # seconds; a worker ends within milliseconds of its parent


@contextmanager
def only_packer(work: Path) -> Iterator[None]:
    """Hold the folder of a packing in progress; wait for the workers of a killed packer to end.

    Raises:
        UserError: another packer holds it.
    """
    descriptor = _acquire(work)
    try:
        _await_orphans(work)
        yield
    finally:
        os.close(descriptor)


def hold_as_worker(work: Path) -> int:
    """Mark this process as a worker of the packing for as long as the returned descriptor stays open."""
    descriptor = os.open(work / _WORKERS_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _acquire(work: Path) -> int:
    while True:
        work.mkdir(parents=True, exist_ok=True)
        path = work / _LOCK
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 20, 0).decode() or "unknown"
            os.close(descriptor)
            raise UserError(
                f"{work.parent}: another packer (process {holder}) is at work there. "
                "Wait for it to end, or choose another output folder."
            ) from error
        # The packer that held it may have finished and removed the file between our open and our lock.
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return descriptor
        os.close(descriptor)


def _await_orphans(work: Path) -> None:
    descriptor = os.open(work / _WORKERS_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _ORPHANS_END_WITHIN
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{work.parent}: workers of an earlier packer have not ended in "
                        f"{_ORPHANS_END_WITHIN:.0f} s. End them (`fuser {work / _WORKERS_LOCK}` lists them) "
                        "and run the same command again."
                    ) from error
                time.sleep(0.05)
    finally:
        os.close(descriptor)
