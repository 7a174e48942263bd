"""What a cache takes on the disk, told before it is built."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from cache_tools.commit import committed_shards
from cache_tools.format import CacheSpec, Paths
from common.errors import UserError

# File system metadata, commit records and what else grows beside the data.
SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class CacheCost:
    """Bytes a cache takes.

    Attributes:
        bytes_per_image: of one view set.
        total: of all view sets.
        remaining: still to be written.
        free: on the disk.
    """

    bytes_per_image: float
    total: int
    remaining: int
    free: int

    def describe(self, view_sets: int, rows: int) -> str:
        """Return one line for the user."""
        return (
            f"{rows:,} images x {view_sets} view set(s) x {self.bytes_per_image / 1e3:.1f} kB = "
            f"{self.total / 1e9:.3f} GB; {self.remaining / 1e9:.3f} GB to write, {self.free / 1e9:.1f} GB free"
        )


def cache_cost(root: Path, spec: CacheSpec, view_sets: int) -> CacheCost:
    """Return what a cache takes, what of it is not yet committed, and the free space where it will lie."""
    place = root
    while not place.exists():
        place = place.parent
    total = spec.view_set_bytes() * view_sets
    done = sum(
        array.file_bytes(spec.shard_rows[shard], spec.capacity)
        for k in range(view_sets)
        for shard in committed_shards(Paths(root), k, spec)
        for array in spec.arrays()
    )
    return CacheCost(
        bytes_per_image=spec.view_set_bytes() / spec.num_rows,
        total=total,
        remaining=total - done,
        free=shutil.disk_usage(place).free,
    )


def check_disk(root: Path, spec: CacheSpec, view_sets: int) -> CacheCost:
    """Return the cost; UserError where the disk is too small for what is left to write."""
    cost = cache_cost(root, spec, view_sets)
    if cost.remaining and cost.remaining + SPARE_BYTES > cost.free:
        raise UserError(
            f"{root}: the disk is too small. {cost.describe(view_sets, spec.num_rows)}. Free "
            f"{(cost.remaining + SPARE_BYTES - cost.free) / 1e9:.2f} GB, choose another folder, or build fewer "
            "view sets."
        )
    return cost
