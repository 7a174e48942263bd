"""What a cache holds: its state on the disk, figures of its tokens from a sample, and how fast it is read here."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_tools.commit import committed_shards
from cache_tools.format import CacheSpec, Paths, read_attributes
from cache_tools.join import SPEC_FIELDS
from cache_tools.read import TeacherCache
from common.errors import UserError


def describe_cache(root: Path) -> dict[str, Any]:
    """Return fingerprint, layout, codec quality and the state of each view set; the tar list is only counted."""
    attributes = read_attributes(root)
    spec = CacheSpec.from_json(attributes["spec"])
    fingerprint = attributes["fingerprint"] | {
        "data": attributes["fingerprint"]["data"] | {"shards": f"{spec.num_shards} tars"}
    }
    return {
        "path": str(root),
        "format_version": attributes["format_version"],
        "codec": spec.codec,
        "rows": spec.num_rows,
        "shards": spec.num_shards,
        "tokens": f"{spec.num_crops} crops x {spec.num_patches} patches x {spec.embed_dim}",
        "bytes_per_image": round(spec.view_set_bytes() / spec.num_rows, 1),
        "view_sets": {
            f"v{k}": f"{len(committed_shards(Paths(root), k, spec))} of {spec.num_shards} shards"
            for k in Paths(root).view_sets()
        },
        "quality": attributes["quality"],
        "fingerprint": fingerprint,
        "made_with": attributes["soft"],
    }


def describe_row(cache: TeacherCache, view_set: int, row: int) -> dict[str, Any]:
    """Return identity, crops and token figures of one row; UserError where there is none."""
    if not 0 <= row < cache.num_rows:
        raise UserError(f"{cache.path}: row {row} was asked for, it holds 0 to {cache.num_rows - 1}.")
    table = cache.table(view_set)
    tokens = next(cache.tokens(view_set, [row]))
    return {
        "view_set": view_set,
        "row": row,
        "id": f"{int(table.uids[row]):016x}",
        "image_crc32c": f"{int(table.image_crcs[row]):08x}",
        "crops": [dict(zip(SPEC_FIELDS, crop, strict=True)) for crop in table.specs[row].tolist()],
        "cls_norms": tokens.cls[0].norm(dim=-1).tolist(),
        "patch_norms_mean": tokens.patches[0].norm(dim=-1).mean(-1).tolist(),
    }


def token_stats(cache: TeacherCache, view_set: int, *, rows: int, seed: int = 0) -> dict[str, Any]:
    """Return figures of the tokens of `rows` rows drawn at random."""
    chosen = np.random.default_rng(seed).choice(cache.num_rows, min(rows, cache.num_rows), replace=False)
    patch_norms, cls_norms, agreement = [], [], []
    for targets in cache.tokens(view_set, np.sort(chosen)):
        patch_norms.append(targets.patches.norm(dim=-1).flatten().numpy())
        cls_norms.append(targets.cls.norm(dim=-1).flatten().numpy())
        unit = targets.cls / targets.cls.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        agreement.append((unit[:, 0] * unit[:, -1]).sum(-1).numpy())
    patches, cls = np.concatenate(patch_norms), np.concatenate(cls_norms)
    return {
        "view_set": view_set,
        "rows": len(chosen),
        "patch_norm": {"median": float(np.median(patches)), "p99": float(np.quantile(patches, 0.99))},
        "cls_norm": {"median": float(np.median(cls)), "p99": float(np.quantile(cls, 0.99))},
        "cls_cosine_of_first_and_last_crop": float(np.concatenate(agreement).mean()),
    }


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
