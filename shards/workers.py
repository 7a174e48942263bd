"""Work shared among processes that end with their parent and stop at once when told; one packer a folder."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from common.errors import UserError
from common.locks import file_lock

Job = TypeVar("Job")
Result = TypeVar("Result")

_ORPHANS_END_WITHIN = 60.0  # seconds; a worker ends within milliseconds of its parent
_stop: Any = None  # in a worker: the byte by which its parent tells it to stop


class _Stopped(Exception):
    """Another worker failed or the user interrupted."""


def check_stop() -> None:
    """Leave the job where the others stop; for jobs to call between their rows."""
    if _stop is not None and _stop.value:
        raise _Stopped


def run_jobs(
    work: Callable[[Job], Result],
    jobs: Iterable[Job],
    workers: int,
    report: Callable[[Result], None],
    *,
    packed_in: Path | None = None,
) -> None:
    """Call `work` for each job in `workers` processes, with one in this process; `report` takes results as they come.

    Ctrl-C is raised between two results. What `work` raises stops the other workers and is raised here.

    Args:
        work: a function of a module, since it is sent to the processes.
        jobs: taken as they are needed: few are in memory.
        workers: processes.
        report: called in this process.
        packed_in: folder of the work in progress in which each worker holds a lock, see `only_packer`.

    Raises:
        UserError: a worker died.
    """
    if workers == 1:
        for job in jobs:
            report(work(job))
        return
    context = multiprocessing.get_context("spawn")
    # Without a lock: a worker killed while it holds one would leave the others and this process waiting for ever.
    stop = context.RawValue("b", 0)
    # In this order: the first lock of a pool starts a process that unblocks Ctrl-C.
    with ProcessPoolExecutor(workers, context, _start_worker, (stop, packed_in)) as pool, _interrupts_held():
        try:
            pending: set[Future[Result]] = set()
            for job in jobs:
                pending.add(pool.submit(work, job))
                if len(pending) >= 2 * workers:
                    pending = _report_finished(pending, report)
            while pending:
                pending = _report_finished(pending, report)
        except BaseException as error:
            stop.value = 1
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    "a worker process died (killed, or out of memory). Run the same command again: what is finished "
                    "is kept; try fewer --workers if memory was short."
                ) from error
            raise


def _report_finished(pending: set[Future[Result]], report: Callable[[Result], None]) -> set[Future[Result]]:
    finished: set[Future[Result]] = set()
    while not finished:
        # Held back so far, a Ctrl-C is delivered between these two calls, where this process holds no lock of the pool.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        finished, pending = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
    for future in finished:
        report(future.result())
    return pending


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait. The workers, which inherit this, never see it. Here it would break into the pool's own locks,
    which then nobody frees."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(stop: Any, packed_in: Path | None) -> None:
    global _stop
    _stop = stop
    if packed_in is not None:
        # Entered and never left: the system lets go of the lock when the process ends.
        hold_as_worker(packed_in).__enter__()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    # Of this thread alone, sys.exit would end nothing. Busy, idle or waiting, a worker must not outlive its parent.
    os._exit(1)


@contextmanager
def only_packer(work: Path) -> Iterator[None]:
    """Hold the folder of a packing in progress, or UserError; wait for the workers of a killed packer to end."""
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
