"""The writing side of one view set: teacher rows in, committed tar shards out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_tools.codec import EncodedRows, NotStorable
from cache_tools.commit import Commit, committed_shards, shard_lock, write_commit
from cache_tools.format import CacheSpec, Paths
from cache_tools.join import CropBatch, pack_ids
from cache_tools.shard_file import ShardFileWriter
from common.atomic import sync_folder
from common.errors import UserError


class TeacherCrops(CropBatch, Protocol):
    """Clean global crops with the identity of their images; `pipeline.loader.TeacherCropBatch` is one."""

    @property
    def crops(self) -> Tensor:
        """uint8 [g*b, G, G, 3], crop-major."""


@dataclass(frozen=True)
class CropGroup:
    """Rows of one tar shard that the teacher sees at once; fields as in `TeacherCrops`."""

    rows: npt.NDArray[np.int64]
    uids: npt.NDArray[np.uint64]
    image_crcs: npt.NDArray[np.uint32]
    view_set: int
    global_crops_spec: npt.NDArray[np.int32]
    crops: Tensor


ReadCrops = Callable[[npt.NDArray[np.int64], int], Iterable[TeacherCrops]]
Encode = Callable[[CropGroup], EncodedRows]


def regroup(batches: Iterable[TeacherCrops], sizes: Iterable[int]) -> Iterator[CropGroup]:
    """Yield groups of exactly the given sizes from batches of any sizes, in order.

    A batch that already is a group passes without a copy. Groups are cut at tar shards, so what the teacher sees at
    once depends on the shard and the batch size alone: not on ranks, nor on where an earlier build was stopped.
    """
    source = iter(batches)
    parts: list[CropGroup] = []
    for size in sizes:
        have = sum(len(part.rows) for part in parts)
        while have < size:
            batch = next(source)
            parts.append(_part(batch, 0, len(batch.rows)))
            have += len(batch.rows)
        rest = have - size
        last = parts.pop()
        cut = len(last.rows) - rest
        parts.append(last if not rest else _part(last, 0, cut))
        yield parts[0] if len(parts) == 1 else _concatenate(parts)
        parts = [_part(last, cut, len(last.rows))] if rest else []


def _part(batch: TeacherCrops, first: int, last: int) -> CropGroup:
    count = len(batch.rows)
    crops = batch.crops
    if (first, last) != (0, count):
        crops = crops.unflatten(0, (-1, count))[:, first:last].flatten(0, 1)
    return CropGroup(
        rows=batch.rows[first:last],
        uids=batch.uids[first:last],
        image_crcs=batch.image_crcs[first:last],
        view_set=batch.view_set,
        global_crops_spec=batch.global_crops_spec[first:last],
        crops=crops,
    )


def _concatenate(parts: list[CropGroup]) -> CropGroup:
    major = [part.crops.unflatten(0, (-1, len(part.rows))) for part in parts]  # [g, b, G, G, 3] each
    return CropGroup(
        rows=np.concatenate([part.rows for part in parts]),
        uids=np.concatenate([part.uids for part in parts]),
        image_crcs=np.concatenate([part.image_crcs for part in parts]),
        view_set=parts[0].view_set,
        global_crops_spec=np.concatenate([part.global_crops_spec for part in parts]),
        crops=torch.cat(major, 1).flatten(0, 1),
    )


def group_sizes(rows: int, batch_size: int) -> list[int]:
    """Return the sizes of the groups of a tar shard."""
    return [batch_size] * (rows // batch_size) + ([rows % batch_size] if rows % batch_size else [])


class ShardWriter:
    """Writes all arrays of one tar shard and commits it, in a thread of its own: the teacher computes meanwhile."""

    def __init__(self, paths: Paths, spec: CacheSpec, view_set: int, shard: int, fingerprint: str):
        self.paths = paths
        self.spec = spec
        self.view_set = view_set
        self.shard = shard
        self.fingerprint = fingerprint
        self._identity: list[CropGroup] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cache-writer")
        self._last: Future[None] | None = None
        self._files: dict[str, ShardFileWriter] = {}
        self._commit_started = False
        try:
            for array in spec.arrays():
                path = paths.chunk(view_set, array, shard)
                self._files[array.name] = ShardFileWriter(path, array, capacity=spec.capacity)
        except BaseException:
            self.abort()
            raise

    def append(self, group: CropGroup, encoded: EncodedRows) -> None:
        """Hand over the next rows; at most one group is waiting, so a slow disk slows the teacher."""
        if self._last is not None:
            self._last.result()
        tensors = {"patch": encoded.patch, "scale": encoded.scale, "cls": encoded.cls}
        stored = {name: _as_bytes(tensor) for name, tensor in tensors.items() if tensor is not None}
        # Without the crops: a shard's worth of them would fill a GPU.
        self._identity.append(replace(group, crops=torch.empty(0)))
        self._last = self._pool.submit(self._write, stored)

    def _write(self, stored: dict[str, npt.NDArray[np.uint8]]) -> None:
        for name, rows in stored.items():
            self._files[name].append(rows)

    def start_commit(self) -> None:
        """Let the thread make every file durable and then write the record by which the shard exists."""
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(self._commit)
        self._commit_started = True

    def commit(self) -> None:
        """Commit and wait for it; what failed in the thread is raised here, and the shard's files are removed."""
        try:
            self.start_commit()
            self.wait()
        except BaseException:
            self.abort()
            raise

    def wait(self) -> None:
        """Wait for a commit that was started; raises what it raised."""
        assert self._last is not None
        self._last.result()
        self._pool.shutdown()

    def _commit(self) -> None:
        no_specs = np.empty((0, self.spec.num_crops, 6), np.int32)
        uids = np.concatenate([np.empty(0, np.uint64), *(group.uids for group in self._identity)])
        crcs = np.concatenate([np.empty(0, np.uint32), *(group.image_crcs for group in self._identity)])
        specs = np.concatenate([no_specs, *(group.global_crops_spec for group in self._identity)])
        rows = len(uids)
        assert rows == self.spec.shard_rows[self.shard]
        self._files["id"].append_whole(pack_ids(uids))
        self._files["img_crc"].append_whole(crcs.astype("<u4").view(np.uint8).reshape(rows, 4))
        self._files["crop"].append_whole(
            np.ascontiguousarray(specs.astype("<i4")).view(np.uint8).reshape(rows, 24 * self.spec.num_crops)
        )
        records = {name: file.close() for name, file in self._files.items()}
        for file in self._files.values():
            sync_folder(file.path.parent)
        write_commit(self.paths, self.view_set, Commit(self.shard, rows, self.fingerprint, records))

    def abort(self) -> None:
        """Remove what was written; a commit that was started comes to its end first, and stays if it succeeds."""
        self._pool.shutdown(wait=True, cancel_futures=not self._commit_started)
        for file in self._files.values():
            file.abort()


def _as_bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    values = np.ascontiguousarray(tensor.cpu().numpy())
    return values.reshape(len(values), -1).view(np.uint8)


@dataclass(frozen=True)
class _Committing:
    """A shard that is being written or committed, with its lock."""

    writer: ShardWriter
    lock: ExitStack

    def finish(self) -> None:
        """Wait for the commit and let go of the lock."""
        try:
            self.writer.wait()
        except BaseException:
            self.writer.abort()
            raise
        finally:
            self.lock.close()

    def give_up(self) -> None:
        """Let a commit that is under way end, remove what is not committed, and let go of the lock."""
        self.writer.abort()
        self.lock.close()


@dataclass(frozen=True)
class ViewSetBuild:
    """What is needed to write the shards of one view set.

    Attributes:
        paths: the cache.
        spec: its shapes.
        view_set: number of the view set; its group exists.
        fingerprint: sha256 of the cache's fingerprint.
        read_crops: reads the clean crops of rows.
        encode: runs teacher and codec.
        batch_size: images the teacher sees at once.
        written: called with the number of rows after each group.
    """

    paths: Paths
    spec: CacheSpec
    view_set: int
    fingerprint: str
    read_crops: ReadCrops
    encode: Encode
    batch_size: int
    written: Callable[[int], None]

    def run(self, *, rank: int, world_size: int) -> int:
        """Write this rank's share of the uncommitted shards, then whatever no other rank holds; return the rows.

        Ranks may list the uncommitted shards at different moments and so disagree about the shares; the locks keep
        each shard to one writer and the second look leaves none out.
        """
        todo = self._uncommitted()
        rows = self._write_shards(todo[rank::world_size])
        for shard in self._uncommitted():
            rows += self._write_shards([shard])
        return rows

    def _uncommitted(self) -> list[int]:
        done = set(committed_shards(self.paths, self.view_set, self.spec))
        return [shard for shard in range(self.spec.num_shards) if shard not in done]

    def _write_shards(self, shards: list[int]) -> int:
        """Write shards from one stream of crops, so that a decoder is set up once for all of them."""
        if not shards:
            return 0
        starts = np.concatenate([[0], np.cumsum(self.spec.shard_rows)])
        wanted = np.concatenate([np.arange(starts[k], starts[k + 1]) for k in shards]).astype(np.int64)
        sizes = [group_sizes(self.spec.shard_rows[k], self.batch_size) for k in shards]

        def stream() -> Iterator[TeacherCrops]:
            yield from self.read_crops(wanted, self.view_set)  # not before the first shard is ours

        groups = regroup(stream(), (size for shard_sizes in sizes for size in shard_sizes))
        rows = 0
        committing: list[_Committing] = []
        try:
            for shard, shard_sizes in zip(shards, sizes, strict=True):
                lock = ExitStack()
                ours = lock.enter_context(shard_lock(self.paths, self.view_set, shard))
                if ours and not self.paths.commit(self.view_set, shard).exists():
                    writer = ShardWriter(self.paths, self.spec, self.view_set, shard, self.fingerprint)
                    committing.append(_Committing(writer, lock))
                    self._write_shard(writer, int(starts[shard]), len(shard_sizes), groups)
                    rows += self.spec.shard_rows[shard]
                else:
                    lock.close()
                    for _ in shard_sizes if shard != shards[-1] else []:
                        next(groups)
                if len(committing) > 1:
                    committing.pop(0).finish()
            while committing:
                committing.pop(0).finish()
        except BaseException:
            for shard_commit in committing:
                shard_commit.give_up()
            raise
        return rows

    def _write_shard(self, writer: ShardWriter, start: int, num_groups: int, groups: Iterator[CropGroup]) -> None:
        """Write one shard and start its commit, which takes as long as the disk needs."""
        for _ in range(num_groups):
            group = next(groups)
            expected = np.arange(start, start + len(group.rows))
            assert np.array_equal(group.rows, expected), (group.rows, expected)
            writer.append(group, self._encode(group))
            start += len(group.rows)
            self.written(len(group.rows))
        writer.start_commit()

    def _encode(self, group: CropGroup) -> EncodedRows:
        try:
            encoded = self.encode(group)
        except NotStorable as error:
            i = error.row
            raise UserError(
                f"{self.paths.root}: view set {self.view_set}, row {int(group.rows[i])} of the shards (id "
                f"{int(group.uids[i]):016x}): {error.what}. The teacher overflows on this image, or its weights "
                "are damaged. Check --teacher_pretrained_weights; nothing of this shard was committed."
            ) from error
        found = (encoded.patch.shape[1:], encoded.cls.shape[1:])
        spec = self.spec
        expected = ((spec.num_crops, spec.num_patches, spec.embed_dim), (spec.num_crops, spec.embed_dim))
        if found != expected:
            raise UserError(
                f"{self.paths.root}: the teacher gives patches and cls of shape {found} an image, the cache was "
                f"laid out for {expected}. Build with the teacher and crop size of this cache."
            )
        return encoded
