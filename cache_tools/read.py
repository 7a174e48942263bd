"""The reader: teacher targets of a batch from the cache, joined by id, checked, decoded on the device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_tools.calibration import load_calibration
from cache_tools.codec import codec_bound, decode_int8, rounding_bound
from cache_tools.commit import Commit, read_commits
from cache_tools.errors import CacheIncomplete
from cache_tools.fingerprint import check_fingerprint, fingerprint_sha256
from cache_tools.format import CacheSpec, Paths, read_attributes
from cache_tools.host_rows import HostRows
from cache_tools.join import CropBatch, RowTable, unpack_ids
from cache_tools.source import RowSource, open_source
from common.errors import UserError
from distill.targets import TeacherTargets

Verify = Literal["always", "once", "off"]
# Host buffers that may wait for their copies to the device before a fetch waits too.
BUFFERS = 3
AnyCropBatch = TypeVar("AnyCropBatch", bound=CropBatch)


@dataclass
class _Process:
    """What belongs to one process and does not survive a fork: threads, open files, buffers, locks."""

    pid: int
    pool: ThreadPoolExecutor
    lock: Lock = field(default_factory=Lock)
    views: dict[int, tuple[RowSource, RowTable]] = field(default_factory=dict)
    free: list[HostRows] = field(default_factory=list)
    on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Ticket:
    """A fetch under way. `result` may be called once."""

    def __init__(
        self, cache: TeacherCache, host: HostRows, rows: int, parts: list[Future[None]], done: Callable[[], None]
    ):
        self.host = host
        self.rows = rows
        self._cache = cache
        self._parts = parts
        self._done = done

    def wait(self) -> None:
        """Wait for the rows; raises what their reading raised."""
        for part in self._parts:
            part.result()
        self._done()

    def result(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> TeacherTargets:
        """Wait for the rows and decode them on `device`; see `TeacherCache.fetch`."""
        self.wait()
        return self._cache._decode(self.host, self.rows, torch.device(device), dtype)


class TeacherCache:
    """An opened cache. Safe to hand to forked and spawned processes and to use from several threads."""

    def __init__(
        self,
        path: Path,
        *,
        expect: dict[str, Any] | None,
        view_sets: tuple[int, ...] | None,
        verify: Verify,
        threads: int,
    ):
        if verify not in ("always", "once", "off"):
            raise UserError(f"verify={verify!r}: unknown. Choose always, once or off.")
        self.path = path
        self.expect = expect
        self.verify: Verify = verify
        self.threads = threads
        self._paths = Paths(path)
        attributes = read_attributes(path)
        self.spec = CacheSpec.from_json(attributes["spec"])
        self.fingerprint: dict[str, Any] = attributes["fingerprint"]
        self.soft: dict[str, Any] = attributes.get("soft", {})
        if expect is not None:
            check_fingerprint(expect, self.fingerprint, where=str(path))
        self.calibration = load_calibration(path, self.spec, self.fingerprint)
        found = self._paths.view_sets()
        self.view_sets = tuple(found) if view_sets is None else view_sets
        absent = sorted(set(self.view_sets) - set(found))
        if absent or not found:
            raise CacheIncomplete(
                f"{path}: has view sets {found}, not {absent}. Build with a larger --view_sets; those that "
                "exist are kept."
            )
        digest = fingerprint_sha256(self.fingerprint)
        self._commits: dict[int, list[Commit]] = {
            k: read_commits(self._paths, k, self.spec, digest) for k in self.view_sets
        }
        self._starts = np.concatenate([[0], np.cumsum(self.spec.shard_rows)]).astype(np.int64)
        self._row_arrays = tuple(array for array in self.spec.arrays() if array.per_row)
        self._seen = {k: np.zeros(self.spec.num_rows, bool) for k in self.view_sets}
        self._process: _Process | None = None
        for k in self.view_sets:
            self._view(k)

    @staticmethod
    def open(
        path: str | Path,
        *,
        expect: dict[str, Any] | None = None,
        view_sets: Iterable[int] | None = None,
        verify: Verify = "always",
        threads: int = 2,
    ) -> TeacherCache:
        """Open a finished cache.

        Args:
            path: its folder.
            expect: fingerprint of what this run would compute itself; None opens whatever is there.
            view_sets: those to use; None for all, each of which must then be finished.
            verify: check each row's crc32c at every read, at its first read in this process, or never.
            threads: reading threads.

        Raises:
            CacheMismatch: the fingerprint differs; the message names each field with both values.
            CacheIncomplete: no cache, or an unfinished one.
            CacheCorrupt: a file is missing or has another size or checksum than was committed.
        """
        chosen = None if view_sets is None else tuple(view_sets)
        return TeacherCache(Path(path), expect=expect, view_sets=chosen, verify=verify, threads=threads)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.expect, self.view_sets, self.verify, self.threads)

    def __enter__(self) -> TeacherCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the reading threads and close the files of this process; a later fetch opens them again."""
        process = self._process
        self._process = None
        if process is not None and process.pid == os.getpid():
            process.pool.shutdown()
            for source, _ in process.views.values():
                source.close()

    @property
    def num_rows(self) -> int:
        """Images in each view set."""
        return self.spec.num_rows

    def uids(self, view_set: int) -> npt.NDArray[np.uint64]:
        """Return the ids of a view set's rows in the order of the shards, uint64 [num_rows]."""
        return self._view(view_set)[1].uids

    def table(self, view_set: int) -> RowTable:
        """Return ids, image checksums and crops of every row of a view set."""
        return self._view(view_set)[1]

    def fetch(
        self, batch: CropBatch, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
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

    def submit(self, batch: CropBatch, *, pinned: bool = False) -> Ticket:
        """Check a batch's identity and begin to read its rows; `Ticket.result` decodes them."""
        return self._read(batch.view_set, self._lookup(batch), pinned=pinned)

    def join(
        self,
        batches: Iterable[AnyCropBatch],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[AnyCropBatch, TeacherTargets]]:
        """Yield each batch with its targets, reading the next batch's rows while the caller uses this one's."""
        pinned = torch.device(device).type == "cuda"
        waiting: tuple[AnyCropBatch, Ticket] | None = None
        for batch in batches:
            following = batch, self.submit(batch, pinned=pinned)
            if waiting is not None:
                yield waiting[0], waiting[1].result(device=device, dtype=dtype)
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result(device=device, dtype=dtype)

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
        ahead: Ticket | None = None
        for start in range(0, len(wanted), batch_size):
            ticket = self._read(view_set, wanted[start : start + batch_size], pinned=pinned)
            if ahead is not None:
                yield ahead.result(device=device, dtype=dtype)
            ahead = ticket
        if ahead is not None:
            yield ahead.result(device=device, dtype=dtype)

    def prefetch(self, view_set: int, rows: npt.ArrayLike) -> None:
        """Ask the kernel to read `rows` (row numbers of the shards) into the page cache; returns at once."""
        source, _ = self._view(view_set)
        for shard, places in self._by_shard(np.unique(np.asarray(rows, np.int64))):
            for array in self._row_arrays:
                source.advise(array, shard, places)

    def bound(self, batch: CropBatch, *, dtype: torch.dtype = torch.float32) -> TeacherTargets:
        """Return the largest difference that the codec allows between `fetch` and the teacher, in float64.

        The teacher's tokens are taken as exact: where it computes in bf16, its own noise between two passes over
        other batches comes on top.
        """
        ticket = self._read(batch.view_set, self._lookup(batch), pinned=False)
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

    def _lookup(self, batch: CropBatch) -> npt.NDArray[np.int64]:
        return self._view(batch.view_set)[1].lookup(batch, where=str(self.path))

    def _by_shard(self, rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Split ascending rows by shard; yields the shard and the places in it."""
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(shards)) + 1):
            if len(part):
                yield int(shards[part[0]]), rows[part] - self._starts[shards[part[0]]]

    def _read(self, view_set: int, rows: npt.NDArray[np.int64], *, pinned: bool) -> Ticket:
        process, (source, _) = self._this_process(), self._view(view_set)
        host = self._host_rows(process, len(rows), pinned)
        order = np.argsort(rows, kind="stable")
        seen = self._seen[view_set]

        def read(slots: npt.NDArray[np.int64]) -> None:
            first = 0
            for shard, places in self._by_shard(rows[slots]):
                part = slots[first : first + len(places)]
                check = self.verify == "always" or (self.verify == "once" and not bool(seen[rows[part]].all()))
                for array in self._row_arrays:
                    source.read(array, shard, places, host.bytes[array.name], part, check=check)
                first += len(places)

        def done() -> None:
            seen[rows] = True

        parts = [process.pool.submit(read, part) for part in np.array_split(order, self.threads) if len(part)]
        return Ticket(self, host, len(rows), parts, done)

    def _decode(self, host: HostRows, rows: int, device: torch.device, dtype: torch.dtype | None) -> TeacherTargets:
        process = self._this_process()
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        moved = host.to(device, self._row_arrays, rows)
        if self.calibration is None:
            patches = moved["patch"].to(dtype, copy=True)
        else:
            if device not in process.on_device:
                process.on_device[device] = self.calibration.tensors(device)
            patches = decode_int8(moved["patch"], moved["scale"], *process.on_device[device], dtype=dtype)
        targets = TeacherTargets(cls=moved["cls"].to(dtype, copy=True), patches=patches)
        self._give_back(host)
        return targets

    def _give_back(self, host: HostRows) -> None:
        process = self._this_process()
        with process.lock:
            process.free.append(host)

    def _host_rows(self, process: _Process, rows: int, pinned: bool) -> HostRows:
        """Take a buffer that no copy reads any more; a new one where there is none and few exist, else wait."""
        with process.lock:
            process.free = [host for host in process.free if host.rows >= rows and host.pinned == pinned]
            ready = next((host for host in process.free if host.is_ready()), None)
            if ready is None and len(process.free) >= BUFFERS:
                ready = process.free[0]
            if ready is not None:
                process.free.remove(ready)
        if ready is None:
            return HostRows(self._row_arrays, rows, pinned=pinned)
        ready.wait()
        return ready

    def _this_process(self) -> _Process:
        if self._process is None or self._process.pid != os.getpid():
            pool = ThreadPoolExecutor(self.threads, thread_name_prefix="teacher-cache")
            self._process = _Process(os.getpid(), pool)
        return self._process

    def _view(self, view_set: int) -> tuple[RowSource, RowTable]:
        views = self._this_process().views
        if view_set not in views:
            if view_set not in self._commits:
                raise UserError(
                    f"{self.path}: view set {view_set} is not open; {list(self.view_sets)} are. Use `epoch mod "
                    f"{len(self.view_sets)}`, or build more view sets."
                )
            source = open_source(self._paths, view_set, self.spec, self._commits[view_set])
            views[view_set] = source, self._load_table(source, view_set)
        return views[view_set]

    def _load_table(self, source: RowSource, view_set: int) -> RowTable:
        arrays = {array.name: array for array in self.spec.arrays()}
        ids, crcs, specs = (
            np.concatenate([source.read_whole(arrays[name], k) for k in range(self.spec.num_shards)])
            for name in ("id", "img_crc", "crop")
        )
        return RowTable.make(
            unpack_ids(ids),
            crcs.view("<u4")[:, 0].astype(np.uint32),
            specs.view("<i4").reshape(-1, *arrays["crop"].tail).astype(np.int32),
            where=str(self._paths.view(view_set)),
        )


def _reopen(
    path: Path, expect: dict[str, Any] | None, view_sets: tuple[int, ...], verify: Verify, threads: int
) -> TeacherCache:
    return TeacherCache.open(path, expect=expect, view_sets=view_sets, verify=verify, threads=threads)
