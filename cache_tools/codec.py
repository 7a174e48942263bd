"""How tokens become bytes and come back: int8 with a scale per token, and fp16 as the reference.

int8: a token x (one of n in a crop) is standardised per channel with calibrated mean m and deviation s, and
divided by its own scale a = max_c |z_c| / 127, rounded up to fp16:

    z = (x - m) / s        q = round(z / a) in [-127, 127]        x' = q a s + m

Nothing is ever clipped, so |z - q a| <= a / 2 and |x - x'| <= s a / 2 in exact arithmetic. Every array of
the codec is little-endian fp16, fp32 or int8, so numpy alone decodes what Zarr returns. cls tokens are fp16
in both codecs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int8
from torch import Tensor

from cache_tools.format import CodecName
from common.errors import UserError
from distill.targets import TeacherTargets

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
