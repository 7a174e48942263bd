"""How fast this machine reads this cache: sequential and random batches, checked and unchecked, page cache as it is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cache_tools.read import TeacherCache


@dataclass(frozen=True)
class ReadSpeed:
    """Median over repetitions.

    Attributes:
        order: "sequential" or "random".
        verify: whether rows were checked.
        images_per_second: encoded rows brought into host memory.
        bytes_per_second: of their files.
    """

    order: str
    verify: bool
    images_per_second: float
    bytes_per_second: float


def measure_reading(
    root: Path, *, batch_size: int, batches: int, threads: int, repetitions: int = 5, seed: int = 0
) -> list[ReadSpeed]:
    """Read batches in both orders, with and without checks, in turns; decoding is left out."""
    generator = np.random.default_rng(seed)
    seconds: dict[tuple[str, bool], list[float]] = {}
    caches = {verify: TeacherCache.open(root, verify=verify, threads=threads) for verify in (True, False)}
    spec = caches[True].spec
    rows_read = min(batch_size * batches, spec.num_rows)
    for _ in range(repetitions):
        first = int(generator.integers(0, spec.num_rows - rows_read + 1))
        orders = {
            "sequential": np.arange(first, first + rows_read),
            "random": generator.choice(spec.num_rows, rows_read, replace=False),
        }
        for order, rows in orders.items():
            for verify, cache in caches.items():
                seconds.setdefault((order, verify), []).append(_read(cache, rows, batch_size))
    for cache in caches.values():
        cache.close()
    row_bytes = sum(array.row_bytes for array in spec.arrays() if array.per_row)
    return [
        ReadSpeed(order, verify, rows_read / float(np.median(times)), rows_read * row_bytes / float(np.median(times)))
        for (order, verify), times in seconds.items()
    ]


def _read(cache: TeacherCache, rows: npt.NDArray[np.int64], batch_size: int) -> float:
    began = time.perf_counter()
    for start in range(0, len(rows), batch_size):
        cache.read_encoded(cache.view_sets[0], rows[start : start + batch_size])
    return time.perf_counter() - began
