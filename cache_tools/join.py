"""The join of a batch with its cache rows: by id, and only where image and crops are still the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cache_tools.layout import CacheCorrupt, CacheStale
from pipeline.batch import ImageBatch

SPEC_FIELDS = ("top", "left", "height", "width", "flip", "image height << 16 | image width")
ID_BYTES = 16


def pack_ids(uids: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    """Return the stored form of ids: 8 bytes little-endian, then 8 zeros kept for longer ids; uint8 [m, 16]."""
    packed = np.zeros((len(uids), ID_BYTES), np.uint8)
    packed[:, :8] = uids.astype("<u8").view(np.uint8).reshape(-1, 8)
    return packed


def unpack_ids(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Return uint64 [m] from uint8 [m, 16]."""
    return np.ascontiguousarray(packed[:, :8]).view("<u8")[:, 0].astype(np.uint64)


@dataclass(frozen=True)
class RowTable:
    """Identity of every row of a view set, in the order of the shards, and the way from id to row.

    Attributes:
        uids: uint64 [N].
        image_crcs: uint32 [N].
        specs: int32 [N, g, 6].
        order: rows by ascending id, int64 [N].
        sorted_uids: uint64 [N].
    """

    uids: npt.NDArray[np.uint64]
    image_crcs: npt.NDArray[np.uint32]
    specs: npt.NDArray[np.int32]
    order: npt.NDArray[np.int64]
    sorted_uids: npt.NDArray[np.uint64]

    @staticmethod
    def make(
        uids: npt.NDArray[np.uint64],
        image_crcs: npt.NDArray[np.uint32],
        specs: npt.NDArray[np.int32],
        *,
        where: str,
    ) -> RowTable:
        """Build the table; CacheCorrupt where two rows have one id, for then no join is sure."""
        order = np.argsort(uids, kind="stable").astype(np.int64)
        sorted_uids = uids[order]
        twice = np.flatnonzero(sorted_uids[1:] == sorted_uids[:-1])
        if len(twice):
            first, second = sorted(order[twice[0] : twice[0] + 2].tolist())
            raise CacheCorrupt(
                f"{where}: rows {first} and {second} both have id {int(sorted_uids[twice[0]]):016x}. The ids were "
                "lost, or the shards hold one image twice. Verify the shards, then build the cache again."
            )
        return RowTable(uids, image_crcs, specs, order, sorted_uids)

    def lookup(self, batch: ImageBatch, *, where: str) -> npt.NDArray[np.int64]:
        """Return the cache row of each image of a batch, int64 [b].

        Raises:
            CacheStale: an id is not in the cache, its JPEG has another checksum, or its crops are others.
        """
        place = np.minimum(np.searchsorted(self.sorted_uids, batch.uids), len(self.uids) - 1)
        unknown = self.sorted_uids[place] != batch.uids
        if unknown.any():
            i = int(np.flatnonzero(unknown)[0])
            raise CacheStale(
                f"{where}: {_image(batch, i)} is not in the cache. It was built from other shards. Build a cache "
                "of these shards in an empty folder."
            )
        rows = self.order[place]
        changed = self.image_crcs[rows] != batch.image_crcs
        if changed.any():
            i = int(np.flatnonzero(changed)[0])
            raise CacheStale(
                f"{where}: {_image(batch, i)}: its JPEG has crc32c {int(batch.image_crcs[i]):08x}, the cache was "
                f"built from {int(self.image_crcs[rows[i]]):08x}. The image changed since. Build the cache again "
                "in an empty folder, or restore the shards."
            )
        if self.specs.shape[1:] != batch.global_crops_spec.shape[1:]:
            raise CacheStale(
                f"{where}: rows hold {self.specs.shape[1]} global crops, the batch has "
                f"{batch.global_crops_spec.shape[1]}. Use the augmentation the cache was built with."
            )
        moved = self.specs[rows] != batch.global_crops_spec
        if moved.any():
            i, crop, field = (int(axis[0]) for axis in np.nonzero(moved))
            raise CacheStale(
                f"{where}: {_image(batch, i)}: {SPEC_FIELDS[field]} of global crop {crop} is "
                f"{int(batch.global_crops_spec[i, crop, field])}, the cache was built with "
                f"{int(self.specs[rows[i], crop, field])}. Another seed, view set or crop plan. Use those of the "
                "cache (`python -m cache_tools inspect` shows them)."
            )
        return rows


def _image(batch: ImageBatch, i: int) -> str:
    return f"view set {batch.view_set}, row {int(batch.rows[i])} of the shards (id {int(batch.uids[i]):016x})"
