"""Is a cache what it says: files, rows, ids, teacher; its figures and reading speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cache_tools.build import Teacher
from cache_tools.codec import load_calibration
from cache_tools.commit import committed_shards, read_commit
from cache_tools.join import SPEC_FIELDS, unpack_ids
from cache_tools.layout import (
    CacheCorrupt,
    CacheSpec,
    Paths,
    metadata_faults,
    read_attributes,
)
from cache_tools.read import TeacherCache
from cache_tools.shard_file import Bytes, ViewSetFiles
from cache_tools.write import ReadCrops
from common.errors import UserError
from common.files import json_sha256
from pipeline.readers import in_batches
from shards.manifest import ShardIndex

# A cached token against the same teacher run again. int8 alone leaves 0.9999; bf16 in batches of other shapes costs up
# to 1e-3 on single tokens. Another teacher, seed or view set is far below.
LEAST_MEAN_COSINE = 0.998
LEAST_COSINE_P1 = 0.98


@dataclass(frozen=True)
class Damage:
    """A committed shard, or with `shard` None the metadata of a view set, that is not what was written."""

    view_set: int
    shard: int | None
    message: str


@dataclass(frozen=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        shards: committed shards looked at, over all view sets.
        rows: rows in them.
        missing: number of uncommitted shards of each unfinished view set.
        damages: what is wrong.
    """

    shards: int
    rows: int
    missing: dict[int, int]
    damages: tuple[Damage, ...]


@dataclass(frozen=True)
class TeacherAgreement:
    """Cached tokens against the teacher run again.

    Attributes:
        rows: images compared.
        mean_cosine: over patch tokens, channels standardised.
        cosine_p1: its first percentile.
        share_within_bound: share of patch values within the codec's bound; 1 for a teacher exact to the bit.
    """

    rows: int
    mean_cosine: float
    cosine_p1: float
    share_within_bound: float


def verify_cache(
    root: Path,
    *,
    deep: bool = False,
    index: ShardIndex | None = None,
    looked_at: Callable[[int], None] = lambda rows: None,
) -> VerifyReport:
    """Check every committed shard of every view set; damage is collected, not raised.

    Args:
        root: the cache.
        deep: read every byte; else sizes, indices, first rows, ids, checksums and crops.
        index: of the shards, to compare ids and image checksums with.
        looked_at: called with the rows of each shard.

    Raises:
        CacheIncomplete, CacheMismatch, CacheCorrupt: it has no readable attributes or calibration at all.
    """
    attributes = read_attributes(root)
    spec, fingerprint = CacheSpec.from_json(attributes["spec"]), attributes["fingerprint"]
    load_calibration(root, spec, fingerprint)
    paths, digest = Paths(root), json_sha256(fingerprint)
    damages: list[Damage] = []
    missing: dict[int, int] = {}
    shards = rows = 0
    for k in paths.view_sets():
        done = committed_shards(paths, k, spec)
        if len(done) < spec.num_shards:
            missing[k] = spec.num_shards - len(done)
        broken = metadata_faults(paths, k, spec)
        damages += [Damage(k, None, message) for message in broken.values()]
        # Rows are read by the layout that follows from the attributes, not by the arrays' own metadata.
        for shard in done:
            try:
                _verify_shard(paths, spec, k, shard, digest, deep=deep, index=index)
            except UserError as error:
                damages.append(Damage(k, shard, str(error)))
            shards += 1
            rows += spec.shard_rows[shard]
            looked_at(spec.shard_rows[shard])
    return VerifyReport(shards, rows, missing, tuple(damages))


def _verify_shard(
    paths: Paths, spec: CacheSpec, view_set: int, shard: int, digest: str, *, deep: bool, index: ShardIndex | None
) -> None:
    commit = read_commit(paths, view_set, shard, spec, digest)
    files = ViewSetFiles(paths, view_set, spec, {shard: commit})
    whole = {array.name: files.read_whole(array, shard) for array in spec.arrays() if not array.per_row}
    for array in spec.arrays():
        if array.per_row:
            file = files.open(array, shard)
            if deep:
                file.check_content()
    if index is not None:
        _check_identity(whole["id"], whole["img_crc"], spec, shard, index, where=str(paths.view(view_set)))


def _check_identity(ids: Bytes, crcs: Bytes, spec: CacheSpec, shard: int, index: ShardIndex, *, where: str) -> None:
    start = sum(spec.shard_rows[:shard])
    part = slice(start, start + spec.shard_rows[shard])
    if len(index) != spec.num_rows:
        raise CacheCorrupt(f"{where}: {spec.num_rows} rows, the shards hold {len(index)}. Give the cache's own shards.")
    for name, found, expected in (
        ("id", unpack_ids(ids), index.uid[part]),
        ("image checksum", crcs.view("<u4")[:, 0], index.crc32c[part]),
    ):
        differ = np.flatnonzero(found != expected)
        if len(differ):
            row = int(differ[0])
            raise CacheCorrupt(
                f"{where}: shard {shard}, row {row}: {name} {int(found[row]):x}, the shards say "
                f"{int(expected[row]):x}; {len(differ)} rows differ. The cache belongs to other shards, or these "
                "changed. Build a cache of these shards in an empty folder."
            )


def verify_against_teacher(
    cache: TeacherCache,
    teacher: Teacher,
    read_crops: ReadCrops,
    *,
    rows: int,
    seed: int,
    device: torch.device,
    batch_size: int = 64,
) -> TeacherAgreement:
    """Run the teacher again on rows drawn from all open view sets, and compare.

    Raises:
        CacheStale: the reader's crops are not those of the cache.
        CacheCorrupt: the tokens disagree by more than the codec and bf16 explain.
    """
    generator = np.random.default_rng(seed)
    cosines, within = [], []
    per_view = -(-rows // len(cache.view_sets))
    for k in cache.view_sets:
        chosen = np.sort(generator.choice(cache.num_rows, min(per_view, cache.num_rows), replace=False))
        for batch in read_crops(in_batches(chosen, batch_size), k):
            live = teacher(batch.crops.to(device), num_crops=cache.spec.num_crops).patches.double().cpu()
            cached = cache.fetch(batch).patches.double()
            mean, std = (0.0, 1.0) if cache.calibration is None else cache.calibration.tensors()
            left, right = ((tokens - mean) / std for tokens in (live, cached))
            cosines.append(torch.nn.functional.cosine_similarity(left, right, dim=-1).flatten())
            within.append(((live - cached).abs() <= cache.bound(batch).patches).double().mean())
    cosine = torch.cat(cosines)
    agreement = TeacherAgreement(
        rows=per_view * len(cache.view_sets),
        mean_cosine=float(cosine.mean()),
        cosine_p1=float(cosine.kthvalue(max(1, len(cosine) // 100)).values),
        share_within_bound=float(torch.stack(within).mean()),
    )
    if agreement.mean_cosine < LEAST_MEAN_COSINE or agreement.cosine_p1 < LEAST_COSINE_P1:
        raise CacheCorrupt(
            f"{cache.path}: the teacher run again on {agreement.rows} images gives other tokens: mean cosine "
            f"{agreement.mean_cosine:.5f} (at least {LEAST_MEAN_COSINE}), 1st percentile {agreement.cosine_p1:.5f} "
            f"(at least {LEAST_COSINE_P1}). Other weights or another decoder than the cache's. Check them "
            "(`inspect` shows its fingerprint), or build again."
        )
    return agreement


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
