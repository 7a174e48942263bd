"""Who packs: one packer at a time in a folder, and its processes, which end with it and stop at once when told."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

from common.errors import UserError
from common.locks import file_lock
from shards.format import WORK_FOLDER
from shards.shard_writer import ShardJob, finish_shard

Report = Callable[[int, int], None]  # (rows done, of them quarantined) of a shard that is finished


class _Stopped(Exception):
    """Another worker failed or the user interrupted."""


_stop: Event


def _start_worker(output: Path, stop: Event) -> None:
    global _stop
    _stop = stop
    # Entered and never left: the system lets go of the lock when the process ends.
    hold_as_worker(output / WORK_FOLDER).__enter__()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the packer to die, and die: idle or not, a worker must not outlive it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _check_stop() -> None:
    if _stop.is_set():
        raise _Stopped


def _finish_shard(job: ShardJob) -> tuple[int, int]:
    return finish_shard(job, _check_stop)


def finish_shards(output: Path, jobs: Iterable[ShardJob], workers: int, report: Report) -> None:
    """Finish shards with `workers` processes; with one, in this process.

    Raises:
        UserError: the first that a worker met; the others have then stopped.
    """
    if workers == 1:
        for job in jobs:
            report(*finish_shard(job, lambda: None))
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(workers, context, _start_worker, (output, stop)) as pool:
        try:
            pending: set[Future[tuple[int, int]]] = set()
            for job in jobs:
                with _interrupts_held():
                    pending.add(pool.submit(_finish_shard, job))
                if len(pending) >= 2 * workers:  # so that the rows of few shards are in memory
                    pending = _report_finished(pending, report)
            while pending:
                pending = _report_finished(pending, report)
        except BaseException as error:
            stop.set()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    f"{output}: a packing process died (killed, or out of memory). Run the same command "
                    "again: what is finished is kept; try fewer --workers if memory was short."
                ) from error
            raise


def _report_finished(pending: set[Future[tuple[int, int]]], report: Report) -> set[Future[tuple[int, int]]]:
    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
    for future in finished:
        report(*future.result())
    return pending


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait: processes started meanwhile never see it, and the parent, which decides, sees it after."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
