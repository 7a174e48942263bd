"""One packer at a time in an output folder, its workers included."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from common.errors import UserError
from common.locks import file_lock

_ORPHANS_END_WITHIN = 60.0  # seconds; a worker ends within milliseconds of its parent


@contextmanager
def only_packer(work: Path) -> Iterator[None]:
    """Hold the folder of a packing in progress; wait for the workers of a killed packer to end.

    Raises:
        UserError: another packer holds it.
    """
    with file_lock(work / "lock", timeout=0) as held:
        if not held:
            raise UserError(
                f"{work.parent}: another packer is at work there. Wait for it to end, or choose another output folder."
            )
        # Each worker holds a lock of its own: one that outlived its packer could still put a file in place.
        for path in sorted(work.glob("worker-*.lock")):
            with file_lock(path, timeout=_ORPHANS_END_WITHIN) as ended:
                if not ended:
                    raise UserError(
                        f"{work.parent}: a worker of an earlier packer has not ended in {_ORPHANS_END_WITHIN:.0f} s. "
                        f"End it (`fuser {path}` names it) and run the same command again."
                    )
                path.unlink(missing_ok=True)
        yield


def hold_as_worker(work: Path) -> AbstractContextManager[bool]:
    """Mark this process as a worker of the packing for as long as the block runs."""
    return file_lock(work / f"worker-{os.getpid()}.lock")
