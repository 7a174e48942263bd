"""Composes the demo's image set from scikit-learn's scans of handwritten digits (Alpaydin and Kaynak, UCI, 1998).

Each scan of 8 x 8 pixels is enlarged and set as light ink of some hue on a dark, slightly noisy ground, at some
size and place, in a JPEG of some size and aspect ratio. No scan is in both train and val.
"""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits
from tqdm import tqdm

# Of 1,797 scans, every fifth of a class is held out for validation.
_HELD_OUT_EVERY = 5
_JPEG_QUALITY = 90


def compose_images(folder: Path, *, train_per_scan: int, val_per_scan: int, seed: int) -> tuple[int, int]:
    """Write `folder/train/digit_N/*.jpg` and `folder/val/digit_N/*.jpg`.

    The same arguments give the same bytes on every machine with the same versions of NumPy and Pillow.

    Returns:
        Number of images in train and in val.
    """
    digits = load_digits()
    scans = digits.images.astype(np.float64) / 16  # [1797, 8, 8] in 0..1
    seen_of_class = [0] * 10
    counts = {"train": 0, "val": 0}
    for scan_number, label in enumerate(tqdm(digits.target.tolist(), desc="composing images", unit="scan")):
        seen_of_class[label] += 1
        split = "val" if seen_of_class[label] % _HELD_OUT_EVERY == 0 else "train"
        target = folder / split / f"digit_{label}"
        target.mkdir(parents=True, exist_ok=True)
        for copy in range(train_per_scan if split == "train" else val_per_scan):
            rng = np.random.Generator(np.random.Philox(key=seed, counter=[scan_number, copy, 0, 0]))
            image = _compose(scans[scan_number], rng)
            Image.fromarray(image).save(target / f"scan{scan_number:04d}_{copy}.jpg", quality=_JPEG_QUALITY)
            counts[split] += 1
    return counts["train"], counts["val"]


def _compose(scan: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return one image, uint8 [height, width, 3]."""
    height, width = (int(side) for side in rng.integers(64, 105, size=2))
    side = int(rng.uniform(0.6, 0.85) * min(height, width))
    # Somewhere in the middle half of the free space, so that the centre crop of an evaluation holds the digit.
    top, left = (int(rng.uniform(0.25, 0.75) * (free - side)) for free in (height, width))
    enlarged = Image.fromarray((scan * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    ink = np.zeros((height, width, 1))
    ink[top : top + side, left : left + side, 0] = np.asarray(enlarged) / 255
    ground = _colour(rng, saturation=0.5, value=(0.05, 0.25))
    light = _colour(rng, saturation=0.6, value=(0.75, 1.0))
    noise = rng.normal(0, 0.02, size=(height, width, 3))
    pixels = ground + (light - ground) * ink + noise
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)


def _colour(rng: np.random.Generator, *, saturation: float, value: tuple[float, float]) -> npt.NDArray[np.float64]:
    return np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, saturation), rng.uniform(*value)))
