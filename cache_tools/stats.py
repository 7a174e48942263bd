"""What a cache holds: its state on the disk, and figures of its tokens from a sample of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

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
