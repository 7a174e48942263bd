"""Made-up inputs: natural-like images (a 1/f spectrum, filled shapes), and tokens with spectra like those of ViTs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor


def natural_image(height: int, width: int, seed: int) -> npt.NDArray[np.uint8]:
    """Make an image, uint8 [height, width, 3].

    Args:
        height: pixels.
        width: pixels.
        seed: of its content.
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1 / max(height, width)
    noise = rng.standard_normal((3, *frequency.shape)) + 1j * rng.standard_normal((3, *frequency.shape))
    channels = np.fft.irfft2(noise / frequency, s=(height, width))
    channels /= channels.std((1, 2), keepdims=True)
    # Photographs vary in lightness far more than in hue.
    mixed = channels[0] + 0.35 * channels
    image = Image.fromarray(np.clip(120 + 45 * mixed, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy())
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = (int(rng.integers(0, side)) for side in (width, height))
        w, h = (int(rng.integers(4, max(5, side // 3))) for side in (width, height))
        red, green, blue = (int(c) for c in rng.integers(0, 256, 3))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + w, y + h), fill=(red, green, blue))
    return np.asarray(image)


def encode(image: npt.NDArray[np.uint8]) -> bytes:
    """JPEG of quality 90 with 4:2:0 chroma."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=90, subsampling="4:2:0")
    return stream.getvalue()


def write_images(
    folder: Path, sizes: Sequence[tuple[int, int]], num_images: int, *, num_classes: int = 4, seed: int = 0
) -> None:
    """Write class folders of JPEGs that go through `sizes` (height, width) in turn."""
    for i in range(num_images):
        path = folder / f"class{i % num_classes}" / f"img{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(natural_image(*sizes[i % len(sizes)], seed + i)))


@dataclass(frozen=True)
class Regime:
    """A common mean direction, smooth fields of power-law strength, white noise, and repeated tokens.

    Attributes:
        mean: share of the squared length that all tokens have in common.
        decay: exponent of the strengths 1 / k^decay of the fields.
        rank: number of fields.
        noise: length of the white part of a token.
        repeated: share of tokens that copy one token.
        repeat_noise: length of the white noise on each copy; 0 makes exact duplicates.
    """

    mean: float
    decay: float
    rank: int
    noise: float
    repeated: float = 0.0
    repeat_noise: float = 0.0


REGIMES = {
    "flat": Regime(mean=0.3, decay=0.5, rank=128, noise=0.5),
    "typical": Regime(mean=0.5, decay=1.0, rank=96, noise=0.2),
    "peaky": Regime(mean=0.7, decay=1.5, rank=64, noise=0.05),
    "near_duplicates": Regime(mean=0.6, decay=1.2, rank=64, noise=0.08, repeated=0.4, repeat_noise=1e-2),
    "duplicates": Regime(mean=0.5, decay=1.0, rank=96, noise=0.2, repeated=0.4),
}


def synthetic_tokens(
    regime: str, num_crops: int, num_tokens: int, channels: int, *, seed: int = 0
) -> Float[Tensor, "b n d"]:
    """float64 tokens of unit length, a pure function of the arguments."""
    generator = torch.Generator().manual_seed(seed)
    crops = [_one_crop(REGIMES[regime], num_tokens, channels, generator) for _ in range(num_crops)]
    return torch.nn.functional.normalize(torch.stack(crops), dim=-1)


def _one_crop(regime: Regime, num_tokens: int, channels: int, generator: torch.Generator) -> Tensor:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    rank = min(regime.rank, channels)
    strengths = torch.arange(1, rank + 1, dtype=torch.float64) ** -regime.decay
    strengths = strengths / strengths.norm()
    # Strong fields are smooth along the tokens, weak ones are rough.
    place = torch.arange(num_tokens, dtype=torch.float64)
    lengths = (0.25 * num_tokens / torch.arange(1, rank + 1, dtype=torch.float64)).clamp_min(0.6)
    kernels = torch.exp(-((place[:, None] - place) ** 2) / (2 * lengths[:, None, None] ** 2))
    kernels = kernels / kernels.square().sum(dim=-1, keepdim=True).sqrt()
    fields = (kernels @ normal(rank, num_tokens, 1)).squeeze(-1).T * strengths  # [n, rank]
    directions = torch.linalg.qr(normal(channels, rank)).Q
    mean = torch.nn.functional.normalize(normal(channels), dim=0)
    white = channels**-0.5
    tokens = regime.mean**0.5 * mean + (1 - regime.mean) ** 0.5 * fields @ directions.T
    tokens = tokens + regime.noise * white * normal(num_tokens, channels)
    copies = torch.randperm(num_tokens, generator=generator)[: round(regime.repeated * num_tokens)]
    if len(copies):
        noise = regime.repeat_noise * white * normal(len(copies), channels)
        tokens[copies] = tokens[copies[0]] + noise
    return tokens
