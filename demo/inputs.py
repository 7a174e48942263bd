"""What the demo makes itself: an image set and a teacher.

The images are scikit-learn's scans of handwritten digits (Alpaydin and Kaynak, UCI, 1998). Each scan of 8 x 8 pixels
is enlarged and set as light ink of some hue on a dark, slightly noisy ground, at some size and place, in a JPEG of some
size and aspect ratio. No scan is in both train and val. The teacher is a small ViT that learns the digits' labels.
"""

from __future__ import annotations

import colorsys
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

from common.errors import UserError, run_command
from demo import CROPS, PATCH_SIZE
from distill.export import Card, export_model
from distill.models import create_backbone
from distill.optim import cosine_schedule
from pipeline.augmentation import Augmentation, CropOptions
from pipeline.batch import normalise
from pipeline.loader import open_loader
from shards.manifest import load_manifest

# Of 1,797 scans, every fifth of a class is held out for validation.
_HELD_OUT_EVERY = 5
_JPEG_QUALITY = 90

_BATCH_SIZE = 64
_LR = 1e-3


def compose_images(folder: Path, *, train_per_scan: int, val_per_scan: int, seed: int) -> tuple[int, int]:
    """Write `folder/images/{train,val}/digit_N/*.jpg` and masks of them, PNGs under `folder/masks`.

    A mask is N + 1 on the square of digit N, else 0.
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
        targets = [folder / kind / split / f"digit_{label}" for kind in ("images", "masks")]
        for target in targets:
            target.mkdir(parents=True, exist_ok=True)
        for copy in range(train_per_scan if split == "train" else val_per_scan):
            rng = np.random.Generator(np.random.Philox(key=seed, counter=[scan_number, copy, 0, 0]))
            image, square = _compose(scans[scan_number], rng)
            name = f"scan{scan_number:04d}_{copy}"
            Image.fromarray(image).save(targets[0] / f"{name}.jpg", quality=_JPEG_QUALITY)
            Image.fromarray(square.astype(np.uint8) * (label + 1)).save(targets[1] / f"{name}.png")
            counts[split] += 1
    return counts["train"], counts["val"]


def _compose(
    scan: npt.NDArray[np.float64], rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Return one image, uint8 [height, width, 3], and where the scan lies on it, [height, width]."""
    height, width = (int(side) for side in rng.integers(64, 105, size=2))
    side = int(rng.uniform(0.6, 0.85) * min(height, width))
    # Somewhere in the middle half of the free space, so that the centre crop of an evaluation holds the digit.
    top, left = (int(rng.uniform(0.25, 0.75) * (free - side)) for free in (height, width))
    enlarged = Image.fromarray((scan * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    ink, square = np.zeros((height, width, 1)), np.zeros((height, width), dtype=bool)
    square[top : top + side, left : left + side] = True
    ink[top : top + side, left : left + side, 0] = np.asarray(enlarged) / 255
    ground = _colour(rng, saturation=0.5, value=(0.05, 0.25))
    light = _colour(rng, saturation=0.6, value=(0.75, 1.0))
    noise = rng.normal(0, 0.02, size=(height, width, 3))
    pixels = ground + (light - ground) * ink + noise
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8), square


def _colour(rng: np.random.Generator, *, saturation: float, value: tuple[float, float]) -> npt.NDArray[np.float64]:
    return np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, saturation), rng.uniform(*value)))


@dataclass(frozen=True)
class TeacherArgs:
    """Options of a teacher for other shards than the demo's."""

    shards: Path
    """Folder of training shards with labels."""
    output: Path
    """Folder of the teacher, a timm model: `--teacher_arch local-dir:<output>`."""
    crops: Annotated[CropOptions, tyro.conf.OmitArgPrefixes] = CROPS
    """Crops; it sees one global crop of an image."""
    steps: int = 2400
    """Steps of 64 images."""
    embed_dim: int = 128
    """Width, 32 a head."""


def train_teacher(
    shards: Path, output: Path, *, augmentation: Augmentation, steps: int, seed: int, embed_dim: int = 96
) -> None:
    """Train a ViT of four blocks on the labels of global crops and write it to `output` as a timm folder.

    Two linear classifiers, on the cls token and on the mean patch token, so that both kinds of token carry
    what the student is to learn. They are thrown away.
    """
    torch.manual_seed(seed)
    size, classes = augmentation.global_crops_size, load_manifest(shards).num_classes
    if not classes:
        raise UserError(f"{shards}: without labels, from which the teacher learns. Pack images with labels.")
    model_args = {
        "embed_dim": embed_dim, "depth": 4, "num_heads": embed_dim // 32, "init_values": 0.1, "img_size": size,
    }  # fmt: skip
    model = create_backbone("vit_small", patch_size=augmentation.patch_size, model_args=model_args)
    heads = nn.ModuleList([nn.Linear(embed_dim, classes) for _ in range(2)])
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_LR, weight_decay=0.05, fused=True)
    # One crop, distorted as the second global crop is: the first is always blurred.
    blur, solarize = augmentation.blur_prob_global[-1:], augmentation.solarize_prob_global[-1:]
    one_crop = dataclasses.replace(
        augmentation, num_global_crops=1, num_local_crops=0, mask_ratio=0.0, blur_prob_global=blur,
        solarize_prob_global=solarize,
    )  # fmt: skip
    loader = open_loader(
        shards, device="cpu", global_batch_size=_BATCH_SIZE, seed=seed, teacher_crops=False, augmentation=one_crop
    )
    with loader, tqdm(total=steps, desc="training the teacher", unit="step") as bar:
        for step, batch in zip(range(steps), loader, strict=False):
            optimizer.param_groups[0]["lr"] = cosine_schedule(
                step, start=_LR, end=_LR / 100, total_steps=steps, warmup_steps=steps // 20
            )
            tokens = model.forward_features(normalise(batch.global_crops))  # type: ignore[operator]
            patches = tokens[:, model.num_prefix_tokens :].mean(1)
            logits = torch.stack([heads[0](tokens[:, 0]), heads[1](patches)])
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.repeat(2))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            bar.update()
            if step % 20 == 0:
                accuracy = (logits.argmax(-1) == batch.labels).float().mean().item()
                bar.set_postfix_str(f"loss {loss.item():.3f}  batch accuracy {accuracy:.0%}")
    card = Card(
        name="small teacher", student_arch="vit_small", teacher_arch=f"labels of {shards.name}", licence="MIT",
        step=steps, ema=False, img_size=size, probe=None,
    )  # fmt: skip
    export_model(model.eval(), output, card=card)


def main() -> int:
    """Train a teacher on the labels of any shards; returns the exit status."""
    args = tyro.cli(TeacherArgs, prog="python -m demo.inputs", use_underscores=True, description=main.__doc__)
    return run_command(
        lambda: train_teacher(
            args.shards, args.output, augmentation=args.crops.crops(patch_size=PATCH_SIZE), steps=args.steps,
            seed=args.crops.data_seed, embed_dim=args.embed_dim,
        )
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
