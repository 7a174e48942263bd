"""The int8 codec's statistics: measured over teacher tokens, and read back from a cache."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cache_tools.codec import Calibration
from cache_tools.errors import CacheCorrupt
from cache_tools.format import CacheSpec, Paths
from common.errors import UserError

# A channel with no more spread than this share of the others' is standardised by this share: a divisor near zero
# would let later data in that channel set the scale of whole tokens.
LEAST_STD_SHARE = 1e-3


class ChannelMoments:
    """Mean and deviation of each channel over tokens that come batch by batch, in fp64 (Chan et al., 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, tokens: Float[Tensor, "*b d"]) -> None:
        """Take in tokens of any leading shape."""
        values = tokens.detach().double().flatten(0, -2)  # [m, d]
        count, mean = len(values), values.mean(0)
        squares = (values - mean).square().sum(0)
        if self._mean is None or self._squares is None:
            self.count, self._mean, self._squares = count, mean, squares
            return
        total = self.count + count
        delta = mean - self._mean
        self._squares += squares + delta.square() * (self.count * count / total)
        self._mean += delta * (count / total)
        self.count = total

    def calibration(self) -> Calibration:
        """Return mean and deviation in fp32; UserError where a token was not finite."""
        assert self._mean is not None and self._squares is not None
        std = (self._squares / self.count).sqrt()
        if not bool(torch.isfinite(std).all()):
            raise UserError(
                f"calibration: {int((~torch.isfinite(std)).sum())} of {len(std)} channels of the teacher's tokens "
                "hold NaN or Inf. The weights are damaged, or the teacher overflows in this dtype. Check "
                "--teacher_pretrained_weights."
            )
        typical = float(std.square().mean().sqrt()) or 1.0
        std = std.clamp(min=LEAST_STD_SHARE * typical)
        return Calibration(
            self._mean.float().cpu().numpy().astype(np.float32), std.float().cpu().numpy().astype(np.float32)
        )


def calibration_sha256(calibration: Calibration) -> str:
    """Return the hash of mean and std that the fingerprint carries."""
    return hashlib.sha256(
        calibration.mean.astype("<f4").tobytes() + calibration.std.astype("<f4").tobytes()
    ).hexdigest()


def load_calibration(path: Path, spec: CacheSpec, fingerprint: dict[str, Any]) -> Calibration | None:
    """Return the int8 codec's statistics, checked against the fingerprint; None for fp16."""
    if spec.codec != "int8":
        return None
    import zarr

    folder = Paths(path).data / "codec"
    try:
        values = [np.asarray(zarr.open_array(folder / name, mode="r")[:]) for name in ("mean", "std")]
    except Exception as error:  # zarr raises many kinds for a damaged array
        raise CacheCorrupt(
            f"{folder}: the codec's mean and std cannot be read ({type(error).__name__}: {error}). Without them "
            "no row can be decoded. Copy the cache again, or build it again."
        ) from error
    calibration = Calibration(values[0].astype(np.float32), values[1].astype(np.float32))
    found, recorded = calibration_sha256(calibration), fingerprint.get("codec", {}).get("calibration")
    if found != recorded:
        raise CacheCorrupt(
            f"{folder}: mean and std have sha256 {found[:16]}, the fingerprint says {str(recorded)[:16]}. They "
            "were altered, and every row would be decoded wrongly. Copy the cache again, or build it again."
        )
    return calibration
