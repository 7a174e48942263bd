"""The demo's last page: the sheet of crops as each network sees them, and where to look next."""

from __future__ import annotations

from pathlib import Path

from demo.settings import DemoConfig
from distill.evaluation.figures import image_grid_figure, write_figure
from pipeline.augmentation import Augmentation
from pipeline.loader import open_loader

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
    masked = batch.masks.view(-1, side, side).repeat_interleave(augmentation.patch_size, 1)
    masked = masked.repeat_interleave(augmentation.patch_size, 2)
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
        f"seed {config.seed}; student: {config.steps} steps of 48 images, targets {config.teacher}; "
        f"CPU, {seconds:.0f} s for what this call had to do\n"
        f"figures:\n{figures}\n"
        f"next: make export RUN={run}, or the README's commands for ImageNet\n"
    )
    (config.output / "results.txt").write_text(text)
    return text
