"""The whole path on a small set, and what its commands share: crops, flags, options."""

from __future__ import annotations

import sys

if sys.argv[0] == "-m":  # `python -m demo` is about to begin, and imports this first
    from common.interrupt import end_at_interrupt

    end_at_interrupt()

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from pipeline.augmentation import CropOptions

PATCH_SIZE = 8
# Crops of 48 and 24 pixels. No flips: a mirrored digit is another sign.
CROPS = CropOptions(
    global_crops_size=48, global_crops_scale=(0.5, 1.0), flip_prob=0.0,
    local_crops_number=4, local_crops_size=24, local_crops_scale=(0.3, 0.7), mask_patch_size=8,
)  # fmt: skip
_STUDENT = f"--patch_size {PATCH_SIZE} --embed_dim 64 --depth 3 --num_heads 2 --layer_scale 1"
# So narrow a student, its weights drawn at 0.02, wants a far higher rate than ViT-S.
_TRAIN = """--batch_size_per_gpu 48 --lr 64e-3 --beta2 0.95 --patch_embed_lr_scale 1 --warmup_epochs 0.5
    --ema_momentum 0.98 --koleo_warmup_steps 100 --num_prototypes 256 --teacher_temp calibrated --no_compile
    --num_threads 2 --log_every 20 --checkpoint_every 50 --knn_every_epochs 2 --knn_max_rows 2000
    --term_gradients_every 100"""
STUDENT_FLAGS, TRAIN_FLAGS = _STUDENT.split(), _TRAIN.split()
VIEW_SETS = 2
PRESET, BASELINE = "recommended", "regression"


@dataclass(frozen=True)
class DemoConfig:
    """Options of the demo."""

    output: Path = Path("demo_run")
    """Folder of images, shards, cache, run and figures. The same command again goes on where it stopped."""
    teacher: Literal["cache", "live"] = "cache"
    """Where the student's targets come from; live runs in a folder of its own, from the same prototypes."""
    train_per_scan: int = 3
    """Training images of each scan."""
    val_per_scan: int = 2
    """Validation images of each scan."""
    teacher_steps: int = 500
    """Steps of the teacher's training, 64 images each."""
    steps: int = 300
    """Steps of each student's distillation, 48 images each."""
    seed: int = 0
    """Seed of the images, of both networks and of all crops."""


def crop_flags(seed: int) -> list[object]:
    """Return the flags that ask another command for the demo's crops."""
    crops = replace(CROPS, data_seed=seed)
    words: list[object] = []
    for option in fields(crops):
        value = getattr(crops, option.name)
        if value != option.default:
            words += [f"--{option.name}", *(value if isinstance(value, tuple) else (value,))]
    return words
