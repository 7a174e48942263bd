"""The reader: teacher targets of a batch from the cache, joined by id, checked, decoded on the device."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_tools.codec import codec_bound, decode_int8, load_calibration, rounding_bound
from cache_tools.commit import finished_view_sets, read_commits
from cache_tools.fingerprint import check_fingerprint
from cache_tools.join import RowTable, unpack_ids
from cache_tools.layout import (
    ArrayLayout,
    CacheCorrupt,
    CacheIncomplete,
    CacheSpec,
    Paths,
    metadata_faults,
    read_attributes,
)
from cache_tools.shard_file import ViewSetFiles
from common.errors import UserError
from common.files import json_sha256
from distill.teacher import TeacherTargets
from pipeline.batch import ImageBatch

# Batches whose rows are being read while the caller uses another: a disk needs many reads at once.
BATCHES_AHEAD = 3
READING_THREADS = 8
# Host buffers that may wait for their copies to the device before a fetch waits too.
BUFFERS = 3
Batch = TypeVar("Batch", bound=ImageBatch)
Item = TypeVar("Item")


class Ticket:
    """A fetch under way. `result` may be called once."""

    def __init__(self, cache: TeacherCache, host: HostRows, rows: int, parts: list[Future[None]]):
        self.host = host
        self.rows = rows
        self._cache = cache
        self._parts = parts

    def wait(self) -> None:
        """Wait for the rows; raises what their reading raised."""
        for part in self._parts:
            part.result()

    def result(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> TeacherTargets:
        """Wait for the rows and decode them on `device`; see `TeacherCache.fetch`."""
        self.wait()
        return self._cache._decode(self.host, self.rows, torch.device(device), dtype)


class TeacherCache:
    """An opened cache. It may be used from several threads, but not after a fork: a child opens its own.

    Attributes:
        path: its folder.
        spec: its shapes and codec.
        fingerprint: what it was made from.
        soft: versions and device that it was made with.
        calibration: the int8 codec's statistics, None for fp16.
        view_sets: numbers of the open view sets.
    """

    def __init__(
        self,
        path: Path,
        *,
        expect: dict[str, Any] | None,
        view_sets: tuple[int, ...] | None,
        verify: bool,
        threads: int,
    ):
        self.path = path
        attributes = read_attributes(path)
        self.spec = CacheSpec.from_json(attributes["spec"])
        self.fingerprint: dict[str, Any] = attributes["fingerprint"]
        self.soft: dict[str, Any] = attributes.get("soft", {})
        if expect is not None:
            check_fingerprint(expect, self.fingerprint, where=str(path))
        self.calibration = load_calibration(path, self.spec, self.fingerprint)
        paths = Paths(path)
        found = paths.view_sets()
        if view_sets is None:
            finished = finished_view_sets(paths, self.spec)
            # One that is being built, or was stopped, keeps nobody from those before it.
            view_sets = tuple(takewhile(lambda k: k in finished, found)) or tuple(found)
        self.view_sets = view_sets
        absent = sorted(set(self.view_sets) - set(found))
        if absent or not found:
            raise CacheIncomplete(
                f"{path}: has view sets {found}, not {absent}. Build with a larger --view_sets; those that "
                "exist are kept."
            )
        self._verify = verify
        self._threads = threads
        self._starts = np.concatenate([[0], np.cumsum(self.spec.shard_rows)]).astype(np.int64)
        self._row_arrays = tuple(array for array in self.spec.arrays() if array.per_row)
        self._views = {k: self._open_view(paths, k) for k in self.view_sets}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="teacher-cache")
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._free: list[HostRows] = []
        # Of the free buffers: fetches come from several threads, and one buffer must not be given to two.
        self._lock = Lock()

    @staticmethod
    def open(
        path: str | Path,
        *,
        expect: dict[str, Any] | None = None,
        view_sets: Iterable[int] | None = None,
        verify: bool = True,
        threads: int = READING_THREADS,
    ) -> TeacherCache:
        """Open a finished cache.

        Args:
            path: its folder.
            expect: fingerprint of what this run would compute itself; None opens whatever is there.
            view_sets: those to use; None for all that are finished, up to the first that is not.
            verify: check each row's crc32c at every read.
            threads: reading threads.

        Raises:
            CacheMismatch: the fingerprint differs; the message names each field with both values.
            CacheIncomplete: no cache, or an unfinished one.
            CacheCorrupt: a file is missing or has another size or checksum than was committed.
        """
        chosen = None if view_sets is None else tuple(view_sets)
        return TeacherCache(Path(path), expect=expect, view_sets=chosen, verify=verify, threads=threads)

    def __enter__(self) -> TeacherCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the reading threads and close the files."""
        self._pool.shutdown()
        for files, _ in self._views.values():
            files.open.cache_clear()

    @property
    def num_rows(self) -> int:
        """Images in each view set."""
        return self.spec.num_rows

    def table(self, view_set: int) -> RowTable:
        """Return ids, image checksums and crops of every row of a view set, in the order of the shards."""
        return self._view(view_set)[1]

    def fetch(
        self, batch: ImageBatch, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> TeacherTargets:
        """Return the teacher's tokens of a batch.

        Args:
            batch: rows are found by `uids`; `image_crcs` and `global_crops_spec` must be what the cache was
                built from.
            device: where the tokens are decoded; on CUDA the copies and the arithmetic join the current stream.
            dtype: of the result; fp32 on the CPU and bf16 on CUDA where None.

        Returns:
            cls [b, g, d], patches [b, g, n, d]: the teacher's tokens within `bound`.

        Raises:
            CacheStale: an id is unknown, or its JPEG or crops differ.
            CacheCorrupt: a row fails its checksum, or its file is not the committed one.
        """
        return self.submit(batch, pinned=torch.device(device).type == "cuda").result(device=device, dtype=dtype)

    def submit(self, batch: ImageBatch, *, pinned: bool = False) -> Ticket:
        """Check a batch's identity and begin to read its rows; `Ticket.result` decodes them."""
        rows = self.table(batch.view_set).lookup(batch, where=str(self.path))
        return self._read(batch.view_set, rows, pinned=pinned)

    def join(
        self,
        batches: Iterable[Batch],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[Batch, TeacherTargets]]:
        """Yield each batch with its targets, reading the rows of those that follow meanwhile."""
        pinned = torch.device(device).type == "cuda"
        tickets = ((batch, self.submit(batch, pinned=pinned)) for batch in batches)
        for batch, ticket in _ahead(tickets):
            yield batch, ticket.result(device=device, dtype=dtype)

    def tokens(
        self,
        view_set: int,
        rows: npt.ArrayLike | None = None,
        *,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Iterator[TeacherTargets]:
        """Yield the tokens of `rows` (row numbers of the shards; None: all) in their order, batch by batch."""
        wanted = np.arange(self.num_rows) if rows is None else np.asarray(rows, np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < self.num_rows):
            raise UserError(
                f"{self.path}: rows {wanted.min()} to {wanted.max()} were asked for, it holds 0 to {self.num_rows - 1}."
            )
        pinned = torch.device(device).type == "cuda"
        parts = (wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size))
        for ticket in _ahead(self._read(view_set, part, pinned=pinned) for part in parts):
            yield ticket.result(device=device, dtype=dtype)

    def bound(self, batch: ImageBatch, *, dtype: torch.dtype = torch.float32) -> TeacherTargets:
        """Return the largest difference that the codec allows between `fetch` and the teacher, in float64.

        The teacher's tokens are taken as exact: where it computes in bf16, its own noise between two passes over
        other batches comes on top.
        """
        ticket = self.submit(batch)
        ticket.wait()
        stored = {array.name: ticket.host.values(array, ticket.rows).clone() for array in self._row_arrays}
        targets = ticket.result(dtype=torch.float32)
        cls = rounding_bound(targets.cls, torch.float16)
        if self.calibration is not None:
            patches = codec_bound(stored["scale"], *self.calibration.tensors())
        else:
            patches = rounding_bound(targets.patches, torch.float16)
        if dtype != torch.float16:  # what is stored in fp16 is not rounded to it again
            cls = cls + rounding_bound(targets.cls, dtype)
        if dtype != torch.float16 or self.calibration is not None:
            patches = patches + rounding_bound(targets.patches, dtype)
        return TeacherTargets(cls=cls, patches=patches)

    def read_encoded(self, view_set: int, rows: npt.NDArray[np.int64]) -> None:
        """Bring rows into host memory as they are stored and check them; nothing is decoded."""
        ticket = self._read(view_set, rows, pinned=False)
        ticket.wait()
        self._give_back(ticket.host)

    def _by_shard(self, rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Split ascending rows by shard; yields the shard and the places in it."""
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(shards)) + 1):
            if len(part):
                yield int(shards[part[0]]), rows[part] - self._starts[shards[part[0]]]

    def _read(self, view_set: int, rows: npt.NDArray[np.int64], *, pinned: bool) -> Ticket:
        files, _ = self._view(view_set)
        host = self._host_rows(len(rows), pinned)
        order = np.argsort(rows, kind="stable")

        def read(slots: npt.NDArray[np.int64]) -> None:
            first = 0
            for shard, places in self._by_shard(rows[slots]):
                part = slots[first : first + len(places)]
                for array in self._row_arrays:
                    files.open(array, shard).read(places, host.bytes[array.name], part, check=self._verify)
                first += len(places)

        parts = [self._pool.submit(read, part) for part in np.array_split(order, self._threads) if len(part)]
        return Ticket(self, host, len(rows), parts)

    def _decode(self, host: HostRows, rows: int, device: torch.device, dtype: torch.dtype | None) -> TeacherTargets:
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        moved = host.to(device, self._row_arrays, rows)
        if self.calibration is None:
            patches = moved["patch"].to(dtype, copy=True)
        else:
            if device not in self._on_device:
                self._on_device[device] = self.calibration.tensors(device)
            patches = decode_int8(moved["patch"], moved["scale"], *self._on_device[device], dtype=dtype)
        targets = TeacherTargets(cls=moved["cls"].to(dtype, copy=True), patches=patches)
        self._give_back(host)
        return targets

    def _give_back(self, host: HostRows) -> None:
        with self._lock:
            self._free.append(host)

    def _host_rows(self, rows: int, pinned: bool) -> HostRows:
        """Take a buffer that no copy reads any more; a new one where there is none and few exist, else wait."""
        with self._lock:
            self._free = [host for host in self._free if host.rows >= rows and host.pinned == pinned]
            ready = next((host for host in self._free if host.is_ready()), None)
            if ready is None and len(self._free) >= BUFFERS:
                ready = self._free[0]
            if ready is not None:
                self._free.remove(ready)
        if ready is None:
            return HostRows(self._row_arrays, rows, pinned=pinned)
        ready.wait()
        return ready

    def _view(self, view_set: int) -> tuple[ViewSetFiles, RowTable]:
        if view_set not in self._views:
            raise UserError(
                f"{self.path}: view set {view_set} is not open; {list(self.view_sets)} are. Use `epoch mod "
                f"{len(self.view_sets)}`, or build more view sets."
            )
        return self._views[view_set]

    def _open_view(self, paths: Paths, view_set: int) -> tuple[ViewSetFiles, RowTable]:
        """Check a view set's metadata, records and sizes, and load its table."""
        commits = read_commits(paths, view_set, self.spec, json_sha256(self.fingerprint))
        for fault in metadata_faults(paths, view_set, self.spec).values():
            raise CacheCorrupt(fault)
        files = ViewSetFiles(paths, view_set, self.spec, commits)
        files.check_sizes()
        arrays = {array.name: array for array in self.spec.arrays()}
        ids, crcs, specs = (
            np.concatenate([files.read_whole(arrays[name], k) for k in range(self.spec.num_shards)])
            for name in ("id", "img_crc", "crop")
        )
        return files, RowTable.make(
            unpack_ids(ids),
            crcs.view("<u4")[:, 0].astype(np.uint32),
            specs.view("<i4").reshape(-1, *arrays["crop"].tail).astype(np.int32),
            where=str(paths.view(view_set)),
        )


def _ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield items in order, each when `BATCHES_AHEAD` more have been asked for."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > BATCHES_AHEAD:
            yield waiting.popleft()
    yield from waiting


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of copies to a device: on the caller's own they would wait for the step before."""
    return torch.cuda.Stream(device)


class HostRows:
    """Encoded rows of one batch in host memory, pinned for CUDA; used again for later batches."""

    def __init__(self, arrays: tuple[ArrayLayout, ...], rows: int, *, pinned: bool):
        self.rows = rows
        self.pinned = pinned
        self.tensors = {
            array.name: torch.empty((rows, array.row_bytes), dtype=torch.uint8, pin_memory=pinned) for array in arrays
        }
        self.bytes = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        self._copied: torch.cuda.Event | None = None

    def values(self, array: ArrayLayout, rows: int) -> Tensor:
        """Return the first `rows` rows in their own dtype and shape, sharing memory."""
        dtype = {"int8": torch.int8, "float16": torch.float16}[array.dtype]
        return self.tensors[array.name][:rows].view(dtype).view(rows, *array.tail)

    def to(self, device: torch.device, arrays: tuple[ArrayLayout, ...], rows: int) -> dict[str, Tensor]:
        """Return the first `rows` rows of each array on `device`, ready for its current stream.

        On the CPU they share memory. On CUDA the host does not wait; `wait` must come before the memory is written
        again.
        """
        if device.type != "cuda":
            return {array.name: self.values(array, rows).to(device) for array in arrays}
        stream, current = _copy_stream(device), torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):
            moved = {array.name: self.values(array, rows).to(device, non_blocking=True) for array in arrays}
            self._copied = torch.cuda.Event()
            self._copied.record(stream)
        current.wait_event(self._copied)
        for tensor in moved.values():
            # Allocated on the copy stream, whose next copy could else take the memory while `current` reads it.
            tensor.record_stream(current)
        return moved

    def is_ready(self) -> bool:
        """Return whether no copy reads this memory any more."""
        return self._copied is None or self._copied.query()

    def wait(self) -> None:
        """Wait until `is_ready`."""
        if self._copied is not None:
            self._copied.synchronize()
