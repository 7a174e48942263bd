"""How tokens become bytes and come back: int8 with a scale per token, and fp16 as the reference.

int8: a token x (one of n in a crop) is standardised per channel with calibrated mean m and deviation s, and
divided by its own scale a = max_c |z_c| / 127, rounded up to fp16:

    z = (x - m) / s        q = round(z / a) in [-127, 127]        x' = q a s + m

Nothing is ever clipped, so |z - q a| <= a / 2 and |x - x'| <= s a / 2 in exact arithmetic. Every array of
the codec is little-endian fp16, fp32 or int8, so numpy alone decodes what Zarr returns. cls tokens are fp16
in both codecs.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int8
from torch import Tensor

from cache_tools.layout import RESTORE, CacheCorrupt, CacheSpec, CodecName, Paths
from common.errors import UserError
from distill.teacher import TeacherTargets

CODE_MAX = 127
FP16_HALF_SUBNORMAL = 2.0**-25
ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
# Roundings in fp32 that scale with |x - m| <= 127 a s: x - m, / s, / a, * s; two more for their products.
FLOAT32_STEPS = 6
# A channel with no more spread than this share of the others' is standardised by this share: a divisor near zero
# would let later data in that channel set the scale of whole tokens.
LEAST_STD_SHARE = 1e-3
# The log-Gram matrix is the losses' own: Gram of normalised tokens plus the identity.
LOG_GRAM_EPS = 1.0


@dataclass(frozen=True)
class Calibration:
    """Per-channel statistics of patch tokens.

    Attributes:
        mean: float32 [d].
        std: float32 [d], positive.
    """

    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]

    def tensors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return mean and std on a device."""
        return torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)


@dataclass(frozen=True)
class EncodedRows:
    """Encoded tokens of `b` images as they are stored.

    Attributes:
        patch: int8 [b, g, n, d], or float16 for the codec "fp16".
        scale: float16 [b, g, n]; None for the codec "fp16".
        cls: float16 [b, g, d].
    """

    patch: Tensor
    scale: Tensor | None
    cls: Tensor


class NotStorable(UserError):
    """A token is not finite, or too large for fp16. `row` is its place in the batch."""

    def __init__(self, row: int, what: str):
        super().__init__(f"{what}, in row {row} of the batch.")
        self.row = row
        self.what = what


def encode(targets: TeacherTargets, *, codec: CodecName, calibration: tuple[Tensor, Tensor] | None) -> EncodedRows:
    """Encode teacher tokens on their device.

    Args:
        targets: tokens of any float dtype.
        codec: "int8" or "fp16".
        calibration: mean and std [d] in fp32 on the tokens' device; only "int8" needs them.

    Raises:
        NotStorable: a token holds NaN or Inf, or exceeds what fp16 can hold (65504; for an int8 scale,
        65504
            deviations). Waits for the device once.
    """
    cls = targets.cls.to(torch.float16)
    if codec == "fp16":
        patch, scale = targets.patches.to(torch.float16), None
        patch_fits = torch.isfinite(patch).flatten(1).all(1)
    else:
        assert calibration is not None
        patch, scale = encode_int8(targets.patches, *calibration)
        patch_fits = torch.isfinite(scale).flatten(1).all(1)
    fits = torch.stack([torch.isfinite(cls).flatten(1).all(1), patch_fits]).cpu()
    if not bool(fits.all()):
        row = int((~fits).any(0).nonzero()[0, 0])
        name, tokens = ("cls token", targets.cls) if not fits[0, row] else ("patch tokens", targets.patches)
        largest = float(tokens[row].float().abs().max())
        raise NotStorable(row, f"{name}: largest magnitude {largest:.6g}, fp16 holds 65504")
    return EncodedRows(patch=patch.contiguous(), scale=scale, cls=cls.contiguous())


def encode_int8(
    patches: Float[Tensor, "*b n d"], mean: Float[Tensor, " d"], std: Float[Tensor, " d"]
) -> tuple[Int8[Tensor, "*b n d"], Float[Tensor, "*b n"]]:
    """Return codes int8 [..., n, d] and scales fp16 [..., n]; infinite where a token cannot be stored."""
    z = (patches.float() - mean) / std
    amax = z.abs().amax(-1)
    scale = (amax / CODE_MAX).to(torch.float16)
    # Up to the next fp16 where rounding went down: for positive numbers that is one more in the bit pattern.
    # scale * 127 needs 18 bits, so fp32 holds it exactly.
    below = scale.float() * CODE_MAX < amax
    scale = (scale.view(torch.int16) + below.to(torch.int16)).view(torch.float16)
    scale = torch.where(torch.isfinite(amax), scale, torch.inf)
    divisor = torch.where(scale == 0, 1.0, scale.float())
    codes = torch.round(z / divisor.unsqueeze(-1)).nan_to_num(0.0)
    return codes.to(torch.int8), scale


def decode_int8(
    codes: Int8[Tensor, "*b n d"],
    scale: Float[Tensor, "*b n"],
    mean: Float[Tensor, " d"],
    std: Float[Tensor, " d"],
    *,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*b n d"]:
    """Return `codes * scale * std + mean`, computed in fp32, where codes times fp16 scales are exact."""
    values = codes.float().mul_(scale.float().unsqueeze(-1))
    return values.mul_(std).add_(mean).to(dtype)


def decode_int8_numpy(
    codes: npt.NDArray[np.int8], scale: npt.NDArray[np.float16], calibration: Calibration
) -> npt.NDArray[np.float32]:
    """The same in numpy, for whoever has Zarr and nothing of this package."""
    values = codes.astype(np.float32) * scale.astype(np.float32)[..., None]
    return values * calibration.std + calibration.mean


def codec_bound(
    scale: Float[Tensor, "*b n"], mean: Float[Tensor, " d"], std: Float[Tensor, " d"]
) -> Float[Tensor, "*b n d"]:
    """Return the largest |x - x'| of each channel of int8-coded tokens decoded in fp32; no data can exceed it.

    |x - x'| <= a s / 2 from rounding to a code: the scale a is the stored fp16 number, rounded up, so its own rounding
    is inside. Added: fp32 arithmetic, 2^-24 each on quantities of at most 127 a s and on the final sum. Handing the
    result out in another dtype adds `rounding_bound` of it.

    Args:
        scale: stored scales, [..., n].
        mean: calibration, [d].
        std: calibration, [d].

    Returns:
        float64 [..., n, d].
    """
    step = scale.double().unsqueeze(-1) * std.double()
    largest = CODE_MAX * step + mean.double().abs()
    unit = ROUNDOFF[torch.float32]
    return step * (0.5 + FLOAT32_STEPS * CODE_MAX * unit) + unit * largest


def rounding_bound(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest error of rounding to `dtype`, in float64.

    Args:
        values: the numbers before or after rounding.
        dtype: 0 for fp32 and fp64, in which the codecs' results are already.
    """
    if dtype in (torch.float32, torch.float64):
        return torch.zeros_like(values, dtype=torch.float64)
    unit = ROUNDOFF[dtype]
    smallest = FP16_HALF_SUBNORMAL if dtype == torch.float16 else 0.0
    return values.double().abs() * (unit * (1 + 2 * unit)) + smallest


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
            f"no row can be decoded. {RESTORE}"
        ) from error
    calibration = Calibration(values[0].astype(np.float32), values[1].astype(np.float32))
    found, recorded = calibration_sha256(calibration), fingerprint.get("codec", {}).get("calibration")
    if found != recorded:
        raise CacheCorrupt(
            f"{folder}: mean and std have sha256 {found[:16]}, the fingerprint says {str(recorded)[:16]}. They "
            f"were altered, and every row would be decoded wrongly. {RESTORE}"
        )
    return calibration


@dataclass(frozen=True)
class CodecQuality:
    """Errors of decoded tokens.

    Attributes:
        cosine: mean cosine of decoded and original tokens.
        standardised_cosine_p1: first percentile of the cosine after centring and scaling each channel: the harder
            test, since a common mean hides errors from the plain cosine.
        gram: relative Frobenius error of the Gram matrix of normalised tokens.
        log_gram: the same of log(Gram + I), which the SPD loss compares.
    """

    cosine: float
    standardised_cosine_p1: float
    gram: float
    log_gram: float

    def to_json(self) -> dict[str, float]:
        """Return a dictionary with six significant digits."""
        return {name: float(f"{value:.6g}") for name, value in asdict(self).items()}


def measure_codec(patches: Float[Tensor, "b n d"], codec: CodecName, calibration: Calibration | None) -> CodecQuality:
    """Encode and decode tokens, and compare; `patches` are crops of n tokens in fp32 on the CPU."""
    if codec == "fp16":
        decoded = patches.half().float()
    else:
        assert calibration is not None
        mean, std = calibration.tensors()
        decoded = decode_int8(*encode_int8(patches, mean, std), mean, std)
    return compare_tokens(patches, decoded)


def compare_tokens(patches: Float[Tensor, "b n d"], decoded: Float[Tensor, "b n d"]) -> CodecQuality:
    """Return the errors of `decoded` against `patches`, computed in fp64."""
    x, y = patches.double(), decoded.double()
    mean = x.mean((0, 1))
    std = x.std((0, 1), correction=0).clamp(min=1e-12)
    cosine = torch.nn.functional.cosine_similarity
    standardised = cosine((x - mean) / std, (y - mean) / std, dim=-1).flatten()
    return CodecQuality(
        cosine=float(cosine(x, y, dim=-1).mean()),
        standardised_cosine_p1=float(standardised.quantile(0.01)),
        gram=_relative(_gram(x), _gram(y)),
        log_gram=_relative(_log(_gram(x)), _log(_gram(y))),
    )


def _gram(tokens: Tensor) -> Tensor:
    normal = torch.nn.functional.normalize(tokens, dim=-1)
    return normal @ normal.mT


def _log(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    logs = (values.clamp(min=0) + LOG_GRAM_EPS).log()
    return (vectors * logs.unsqueeze(-2)) @ vectors.mT


def _relative(expected: Tensor, found: Tensor) -> float:
    return float((expected - found).norm() / expected.norm().clamp(min=1e-300))
