"""Natural-like images: a 1/f spectrum in correlated channels, and a few filled shapes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw


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
