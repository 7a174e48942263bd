"""The run's folder: config.json is written at the first start and compared at every later one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from common.atomic import write_atomic
from common.errors import UserError
from distill.config import TrainConfig

# Where and how a run executes, not what it computes: these may change between two starts of one run.
FREE_SETTINGS = frozenset(
    {
        "data_path", "val_data_path", "cache_path", "num_threads", "on_bad_sample", "skip_budget", "batch_size_per_gpu",
        "output_dir", "device", "compile", "compile_backend", "check_compile", "log_every",
        "term_gradients_every", "checkpoint_every", "keep_checkpoints", "keep_every", "knn_every_epochs",
        "knn_max_rows", "tensorboard",
    }
)  # fmt: skip


def load_config(run_dir: Path) -> TrainConfig:
    """Read a run's config.json; UserError where there is none."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file, so {run_dir} is not the folder of a run. Check --run / --output_dir.")
    return TrainConfig.from_json(path.read_text())


def write_or_check_config(config: TrainConfig, run_dir: Path) -> None:
    """Write config.json into a new folder, or check it against the run that the folder holds.

    Raises:
        UserError: a setting that decides what is computed differs; the message lists each.
    """
    path = run_dir / "config.json"
    if path.is_file():
        before, now = _flat(load_config(run_dir)), _flat(config)
        lines = [
            f"{name}: the run has {before[name]!r}, now {now[name]!r}"
            for name in before
            if name not in FREE_SETTINGS and before[name] != now[name]
        ]
        if lines:
            raise UserError(
                f"{path}: this folder holds a run with other settings:\n  " + "\n  ".join(lines) + "\n"
                "Give the same settings to resume it, or another --output_dir to start anew."
            )
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(path, config.to_json().encode())


def _flat(config: TrainConfig) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in dataclasses.asdict(config).items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat
