"""Processes that finish shards side by side, end with their parent and stop at once when told."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path

from common.errors import UserError
from shards.format import WORK_FOLDER
from shards.listing import Listing
from shards.lock import hold_as_worker
from shards.reader import ImageReader
from shards.shard_writer import ShardSettings, is_finished, write_shard
from shards.sources.base import Container

LISTING_FOLDER, RECORDS_FOLDER = "listing", "records"
Report = Callable[[int, int], None]  # (rows done, of them quarantined), since the last report


class _Stopped(Exception):
    """Another worker failed or the user interrupted."""


@dataclass(frozen=True)
class PackJob:
    """Everything that a worker needs, small enough to be sent to it."""

    output: Path
    containers: Sequence[Container]
    settings: ShardSettings


class ShardPacker:
    """Finishes shards of one job, in this process."""

    def __init__(self, job: PackJob) -> None:
        """Open the listing of the job."""
        self._job = job
        self._work = job.output / WORK_FOLDER
        self._listing = Listing(self._work / LISTING_FOLDER)
        self._reader = ImageReader(job.containers)

    def finish(self, number: int, tick: Report) -> None:
        """Keep the shard if it is finished and whole, otherwise pack it."""
        records = self._work / RECORDS_FOLDER
        record = is_finished(number, self._job.output, records)
        if record is not None:
            tick(record.entry.rows + len(record.quarantined), len(record.quarantined))
            return
        try:
            write_shard(
                number, self._job.output, records, self._listing, self._reader, self._job.settings, tick
            )
        finally:
            self._reader.close()


@dataclass(frozen=True)
class _Shared:
    stop: Event
    done: Synchronized[int]
    quarantined: Synchronized[int]

    def tick(self, done: int, quarantined: int) -> None:
        if self.stop.is_set():
            raise _Stopped
        with self.done.get_lock():
            self.done.value += done
        if quarantined:
            with self.quarantined.get_lock():
                self.quarantined.value += quarantined


_worker: tuple[ShardPacker, _Shared]


def _start_worker(job: PackJob, shared: _Shared) -> None:
    global _worker
    hold_as_worker(job.output / WORK_FOLDER)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = ShardPacker(job), shared


def _end_with_parent() -> None:
    """Wait for the packer to die, and die: idle or not, a worker must not outlive it, for it holds the lock."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _finish_shard(number: int) -> None:
    packer, shared = _worker
    packer.finish(number, shared.tick)


def finish_shards(job: PackJob, numbers: Iterable[int], workers: int, report: Report) -> None:
    """Finish the shards of those numbers with `workers` processes; with one, in this process.

    Raises:
        UserError: the first that a worker met; the others have then stopped.
    """
    if workers == 1:
        packer = ShardPacker(job)
        for number in numbers:
            packer.finish(number, report)
        return
    context = multiprocessing.get_context("spawn")
    shared = _Shared(context.Event(), context.Value("q", 0), context.Value("q", 0))
    with ProcessPoolExecutor(workers, context, _start_worker, (job, shared)) as pool:
        try:
            with _interrupts_ignored():  # which the processes started here inherit: the parent decides
                futures = [pool.submit(_finish_shard, number) for number in numbers]
            _watch(futures, shared, report)
        except BaseException as error:
            shared.stop.set()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    f"{job.output}: a packing process died (killed, or out of memory). Run the same command "
                    "again: what is finished is kept; try fewer --workers if memory was short."
                ) from error
            raise


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _watch(futures: list[Future[None]], shared: _Shared, report: Report) -> None:
    seen_done = seen_quarantined = 0
    pending: set[Future[None]] = set(futures)
    while pending:
        finished, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
        done, quarantined = shared.done.value, shared.quarantined.value
        report(done - seen_done, quarantined - seen_quarantined)
        seen_done, seen_quarantined = done, quarantined
        for future in finished:
            future.result()
