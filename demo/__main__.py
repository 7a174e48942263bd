"""Runs the whole path on a small image set: the commands of the README, one after the other, each resumable.

python -m demo [--teacher live]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import tyro

from common.errors import UserError, run_command
from demo import BASELINE, CROPS, PATCH_SIZE, PRESET, STUDENT_FLAGS, TRAIN_FLAGS, VIEW_SETS, DemoConfig, crop_flags
from demo.inputs import compose_images, train_teacher
from distill.evaluation.figures import image_grid_figure, write_figure
from pipeline.augmentation import Augmentation
from pipeline.loader import open_loader


def run_demo(config: DemoConfig) -> None:
    """Compose, pack, train the teacher, cache, distill, probe, draw."""
    start = time.perf_counter()
    root = config.output
    root.mkdir(parents=True, exist_ok=True)
    check_settings(config)
    augmentation = CROPS.crops(patch_size=PATCH_SIZE)

    heading("1/6  images: scikit-learn's handwritten digits, as colour JPEGs of mixed sizes")
    images = root / "images"
    if not (root / "images.done").exists():
        train, val = compose_images(
            root, train_per_scan=config.train_per_scan, val_per_scan=config.val_per_scan, seed=config.seed
        )
        (root / "images.done").write_text(f"{train} train, {val} val\n")
    print((root / "images.done").read_text(), end="")

    train_shards = root / "shards" / "train"
    heading("2/6  shards")
    for split in ("train", "val"):
        command("-m", "shards", "pack", "--source", images / split, "--output", root / "shards" / split)

    heading("3/6  teacher: a small ViT learns the digits (ImageNet runs start from DINOv3 ViT-L/16 instead)")
    teacher = root / "teacher"
    if not (teacher / "config.json").exists():
        train_teacher(train_shards, teacher, augmentation=augmentation, steps=config.teacher_steps, seed=config.seed)
    teacher_flags = ["--teacher_arch", f"local-dir:{teacher}"]

    heading(f"4/6  cache: the teacher's outputs for {VIEW_SETS} view sets, to zarr")
    command(
        "-m", "cache_tools", "build", "--shards", train_shards, "--cache", root / "cache",
        "--view_sets", VIEW_SETS, *teacher_flags, *crop_flags(config.seed),
    )  # fmt: skip

    heading(f"5/6  distill: {PRESET}, then the plain baseline {BASELINE}, from one cache (eager, as suits a CPU)")
    suffix = "" if config.teacher == "cache" else "_live"
    run, baseline = root / f"run{suffix}", root / f"{BASELINE}{suffix}"
    for preset, folder in ((PRESET, run), (BASELINE, baseline)):
        command(
            "train.py", "--preset", preset, "--data_path", train_shards, "--val_data_path", root / "shards" / "val",
            "--cache_path", root / "cache", "--teacher", config.teacher, "--output_dir", folder,
            "--max_steps", config.steps, "--seed", config.seed,
            *teacher_flags, *crop_flags(config.seed), *STUDENT_FLAGS, *TRAIN_FLAGS,
        )  # fmt: skip

    heading("6/6  probe: the student, its baseline, the teacher and random weights")
    command(
        "probe.py", "--run", run, "--models", "run", f"run:{baseline}", "teacher", "random", "--layers", "1",
        "--knn_k", "10", "20", "--max_train_rows", "3000", "--segmentation", root, "--segmentation_images", "400",
    )  # fmt: skip
    write_crop_sheet(train_shards, augmentation, run / "probe" / "crops.png", seed=config.seed)
    print(write_summary(run, config, seconds=time.perf_counter() - start))


def check_settings(config: DemoConfig) -> None:
    """Refuse to go on in a folder that was begun with other images or another teacher."""
    path = config.output / "demo.json"
    decisive = {f: getattr(config, f) for f in ("train_per_scan", "val_per_scan", "teacher_steps", "seed")}
    if path.exists() and json.loads(path.read_text()) != decisive:
        raise UserError(
            f"{path}: this folder was begun with {path.read_text()}, now {json.dumps(decisive)}. "
            "Give another --output, or delete the folder."
        )
    path.write_text(json.dumps(decisive))


def command(*words: object) -> None:
    """Show a command and run it with this Python."""
    texts = [str(word) for word in words]
    print("$ python " + " ".join(texts), flush=True)
    status = subprocess.run([sys.executable, *texts], check=False).returncode
    if status != 0:
        raise UserError(f"`python {' '.join(texts[:3])} ...` ended with status {status}; its message stands above.")


def heading(text: str) -> None:
    """Print what comes next."""
    print(f"\n== {text}", flush=True)


def main() -> int:
    """Run from the command line; return the exit status."""
    # All cores for one process; set before the commands, so that they inherit it.
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count() or 1)
    torch.set_num_threads(os.cpu_count() or 1)
    config = tyro.cli(DemoConfig, prog="python -m demo", use_underscores=True, description=__doc__)
    return run_command(lambda: run_demo(config))


_SHEET_IMAGES = 6
_SHEET_LOCALS = 4


def write_crop_sheet(shards: Path, augmentation: Augmentation, path: Path, *, seed: int) -> None:
    """Draw some images' crops: what the teacher sees, what the student sees, and which patches are masked."""
    with open_loader(
        shards, device="cpu", global_batch_size=_SHEET_IMAGES, seed=seed, augmentation=augmentation, teacher_crops=True
    ) as loader:
        batch = next(iter(loader))
    assert batch.teacher_crops is not None
    side = augmentation.global_crops_size // augmentation.patch_size
    pixels = torch.ones(augmentation.patch_size, augmentation.patch_size, dtype=torch.bool)
    masked = torch.kron(batch.masks.view(-1, side, side), pixels[None])
    hidden = batch.global_crops.masked_fill(masked[..., None], 127)
    b, columns = _SHEET_IMAGES, {}
    for view in range(augmentation.num_global_crops):
        rows = slice(view * b, (view + 1) * b)
        columns[f"teacher, crop {view + 1}"] = list(batch.teacher_crops[rows].numpy())
        columns[f"student, crop {view + 1}"] = list(batch.global_crops[rows].numpy())
        columns[f"iBOT tokens, crop {view + 1}"] = list(hidden[rows].numpy())
    for view in range(min(_SHEET_LOCALS, augmentation.num_local_crops)):
        columns[f"local {view + 1}"] = list(batch.local_crops[view * b : (view + 1) * b].numpy())
    write_figure(image_grid_figure(columns, cell_inches=1.3), path)


def write_summary(run: Path, config: DemoConfig, *, seconds: float) -> str:
    """Write results.txt beside the run and return it: the table, the seed, the files to look at."""
    probe = run / "probe"
    figures = "\n".join(f"  {path}" for path in sorted(probe.glob("*.png")))
    text = (
        f"\n{(probe / 'table.txt').read_text().rstrip()}\n\n"
        f"seed {config.seed}; student: {config.steps} steps of 48 images by preset {PRESET}, beside it {BASELINE}; "
        f"targets {config.teacher}; "
        f"CPU, {seconds:.0f} s for what this call had to do\n"
        f"figures:\n{figures}\n"
        f"next: make export RUN={run}, or the README's commands for ImageNet\n"
    )
    (config.output / "results.txt").write_text(text)
    return text


if __name__ == "__main__":
    sys.exit(main())
