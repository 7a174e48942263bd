"""The writing side of one view set: teacher rows in, committed tar shards out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from cache_tools.codec import EncodedRows, NotStorable
from cache_tools.commit import Commit, committed_shards, shard_lock, write_commit
from cache_tools.join import pack_ids
from cache_tools.layout import CacheSpec, Paths
from cache_tools.shard_file import ShardFileWriter
from common.errors import UserError
from pipeline.batch import CropBatch
from pipeline.readers import in_batches

Rows = npt.NDArray[np.int64]
# Reads the clean crops of given batches of rows, for a view set; one batch for each.
ReadCrops = Callable[[Sequence[Rows], int], Iterable[CropBatch]]
Encode = Callable[[CropBatch], EncodedRows]


class ShardWriter:
    """Writes all arrays of one tar shard and commits it, in a thread of its own: the teacher computes meanwhile."""

    def __init__(
        self, paths: Paths, spec: CacheSpec, view_set: int, shard: int, fingerprint: str, lock: ExitStack | None = None
    ):
        """Begin the files; `lock` is let go of at the end, however it comes."""
        self._paths, self._spec, self._view_set, self._shard = paths, spec, view_set, shard
        self._fingerprint = fingerprint
        self._identity: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32], npt.NDArray[np.int32]]] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cache-writer")
        self._last: Future[None] | None = None
        self._commit_started = False
        self._lock = lock or ExitStack()
        self._files: dict[str, ShardFileWriter] = {}
        try:
            for array in spec.arrays():
                path = paths.chunk(view_set, array, shard)
                self._files[array.name] = ShardFileWriter(path, array, capacity=spec.capacity)
        except BaseException:
            self.abort()
            raise

    def append(self, batch: CropBatch, encoded: EncodedRows) -> None:
        """Hand over the next rows; at most one batch is waiting, so a slow disk slows the teacher."""
        # Raises what the thread met, and bounds the memory: one batch is being written, one is at hand.
        if self._last is not None:
            self._last.result()
        tensors = {"patch": encoded.patch, "scale": encoded.scale, "cls": encoded.cls}
        stored = {name: _as_bytes(tensor) for name, tensor in tensors.items() if tensor is not None}
        self._identity.append((batch.uids, batch.image_crcs, batch.global_crops_spec))
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

    def finish(self) -> None:
        """Wait for a commit that was started; what failed in the thread is raised, and the shard's files go."""
        assert self._last is not None
        try:
            self._last.result()
        finally:
            self.abort()

    def _commit(self) -> None:
        g, rows = self._spec.num_crops, self._spec.shard_rows[self._shard]
        nothing = (np.empty(0, np.uint64), np.empty(0, np.uint32), np.empty((0, g, 6), np.int32))
        uids, crcs, specs = (np.concatenate(parts) for parts in zip(nothing, *self._identity, strict=True))
        assert len(uids) == rows
        self._files["id"].append_whole(pack_ids(uids))
        self._files["img_crc"].append_whole(crcs.astype("<u4").view(np.uint8).reshape(rows, 4))
        self._files["crop"].append_whole(specs.astype("<i4").reshape(rows, 6 * g).view(np.uint8))
        records = {name: file.close() for name, file in self._files.items()}
        write_commit(self._paths, self._view_set, Commit(self._shard, rows, self._fingerprint, records))

    def abort(self) -> None:
        """Remove what is not committed; a commit that was started comes to its end first, and stays if it succeeds."""
        self._pool.shutdown(wait=True, cancel_futures=not self._commit_started)
        for file in self._files.values():
            file.abort()
        self._lock.close()


def _as_bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    values = np.ascontiguousarray(tensor.cpu().numpy())
    return values.reshape(len(values), -1).view(np.uint8)


@dataclass(frozen=True)
class ViewSetBuild:
    """What is needed to write the shards of one view set.

    Attributes:
        paths: the cache.
        spec: its shapes.
        view_set: number of the view set; its group exists.
        fingerprint: sha256 of the cache's fingerprint.
        read_crops: reads the clean crops of batches of rows.
        encode: runs teacher and codec.
        batch_size: images the teacher sees at once. Batches are cut at tar shards, so what it sees depends on shard
            and batch size alone: not on ranks, nor on where an earlier build was stopped.
        written: called with the number of rows after each batch.
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
        starts = [0, *np.cumsum(self.spec.shard_rows).tolist()]
        wanted = [in_batches(np.arange(starts[k], starts[k + 1]), self.batch_size) for k in shards]

        def stream() -> Iterator[CropBatch]:
            yield from self.read_crops([rows for batches in wanted for rows in batches], self.view_set)

        batches = stream()  # decodes nothing before the first shard is ours
        rows = 0
        committing: list[ShardWriter] = []
        try:
            for shard, expected in zip(shards, wanted, strict=True):
                lock = ExitStack()
                ours = lock.enter_context(shard_lock(self.paths, self.view_set, shard))
                if ours and not self.paths.commit(self.view_set, shard).exists():
                    writer = ShardWriter(self.paths, self.spec, self.view_set, shard, self.fingerprint, lock)
                    committing.append(writer)
                    self._write_shard(writer, expected, batches)
                    rows += self.spec.shard_rows[shard]
                else:
                    lock.close()
                    for _ in expected if shard != shards[-1] else []:
                        next(batches)
                if len(committing) > 1:
                    committing.pop(0).finish()
            while committing:
                committing.pop(0).finish()
        except BaseException:
            for writer in committing:
                writer.abort()
            raise
        return rows

    def _write_shard(self, writer: ShardWriter, expected: list[Rows], batches: Iterator[CropBatch]) -> None:
        """Write one shard and start its commit, which takes as long as the disk needs."""
        for rows in expected:
            batch = next(batches)
            assert np.array_equal(batch.rows, rows), (batch.rows, rows)
            writer.append(batch, self._encode(batch))
            self.written(len(rows))
        writer.start_commit()

    def _encode(self, batch: CropBatch) -> EncodedRows:
        try:
            encoded = self.encode(batch)
        except NotStorable as error:
            i = error.row
            raise UserError(
                f"{self.paths.root}: view set {self.view_set}, row {int(batch.rows[i])} of the shards (id "
                f"{int(batch.uids[i]):016x}): {error.what}. The teacher overflows on this image, or its weights "
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
