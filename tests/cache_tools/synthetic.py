"""Crops and a teacher made of arithmetic alone: for tests without images or weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import UInt8
from torch import Tensor

from cache_tools.build import BuildRequest
from cache_tools.layout import CacheSpec, CodecName
from distill.teacher import TeacherTargets
from pipeline.batch import CropBatch

CROP_SIZE = 8
PATCH_SIZE = 4
EMBED_DIM = 16
OUTLIER_CHANNEL, OUTLIER_SCALE = 3, 30.0


def synthetic_uids(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Return an id for each row number, spread over 64 bits."""
    digests = [hashlib.blake2b(b"%d" % row, digest_size=8).digest() for row in rows.tolist()]
    return np.array([int.from_bytes(digest, "little") for digest in digests], np.uint64)


def synthetic_batch(rows: npt.NDArray[np.int64], view_set: int, *, seed: int = 0) -> CropBatch:
    """Return two crops of noise an image, a pure function of (row, view set, seed)."""
    crops, specs = [], []
    for row in rows.tolist():
        generator = np.random.default_rng([row, view_set, seed])
        crops.append(generator.integers(0, 256, (2, CROP_SIZE, CROP_SIZE, 3), np.uint8))
        specs.append(generator.integers(0, 1 << 20, (2, 6), np.int32))
    uids = synthetic_uids(rows)
    return CropBatch(
        rows=rows,
        uids=uids,
        image_crcs=(uids >> np.uint64(32)).astype(np.uint32),
        labels=torch.zeros(len(rows), dtype=torch.int64),
        view_set=view_set,
        global_crops_spec=np.stack(specs),
        crops=torch.from_numpy(np.stack(crops, 1)).flatten(0, 1),
    )


class SyntheticReader:
    """Reads crops of noise; called as a loader's `read_teacher_crops` is."""

    def __init__(self, *, seed: int = 0):
        self.seed = seed

    def __call__(self, batches: Sequence[npt.NDArray[np.int64]], view_set: int) -> Iterator[CropBatch]:
        for rows in batches:
            yield synthetic_batch(rows, view_set, seed=self.seed)


class SyntheticTeacher:
    """Tokens from patch means by a fixed random map, with one outlier channel, as real features have.

    Only elementwise arithmetic and sums of three numbers: a row's tokens do not depend on the rows beside it.
    """

    embed_dim = EMBED_DIM

    def __init__(self, seed: int = 0):
        self.seed = seed
        weights = np.random.default_rng([seed, 77]).standard_normal((EMBED_DIM, 3))
        weights[OUTLIER_CHANNEL] *= OUTLIER_SCALE
        self.weights = torch.tensor(weights)

    def num_patches(self) -> int:
        """Return the patch tokens of one crop."""
        return (CROP_SIZE // PATCH_SIZE) ** 2

    def __call__(self, crops: UInt8[Tensor, "gb G G 3"], num_crops: int = 2) -> TeacherTargets:
        """Return image-major tokens in fp32."""
        grid, side = CROP_SIZE // PATCH_SIZE, PATCH_SIZE
        cells = crops.double().view(-1, grid, side, grid, side, 3).mean((2, 4)).flatten(1, 2) / 255  # [gb, n, 3]
        tokens = (cells.unsqueeze(-2) * self.weights).sum(-1) + torch.linspace(-1, 1, EMBED_DIM).double()
        patches = tokens.float().unflatten(0, (num_crops, -1)).transpose(0, 1).contiguous()
        return TeacherTargets(cls=patches.mean(2), patches=patches)

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides its outputs."""
        return {"architecture": "synthetic", "seed": self.seed}


def synthetic_request(
    root: Path,
    *,
    shard_rows: tuple[int, ...] = (7, 7, 4),
    codec: CodecName = "int8",
    view_sets: int = 1,
    teacher: SyntheticTeacher | None = None,
    seed: int = 0,
    batch_size: int = 4,
) -> BuildRequest:
    """Return the request of a small cache of synthetic crops."""
    spec = CacheSpec(shard_rows, num_crops=2, num_patches=4, embed_dim=EMBED_DIM, codec=codec)
    fingerprint = {
        "teacher": (teacher or SyntheticTeacher()).fingerprint(),
        "crops": {"seed": seed},
        "data": {
            "rows": sum(shard_rows),
            "shards": [f"shard-{k:06d}.tar {n}" for k, n in enumerate(shard_rows)],
        },
        "codec": {"name": codec},
    }
    return BuildRequest(root, spec, fingerprint, view_sets, batch_size, torch.device("cpu"), calibration_rows=6)
