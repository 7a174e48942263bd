"""A small packed image set with a small teacher and its cache, made once by the project's own commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from cache_tools.__main__ import main as cache_tools
from demo.inputs import compose_images
from distill.export import Card, export_model
from distill.models import create_backbone
from distill.runtime import parse_config, process_group
from shards.pack import pack

ROOT = Path(__file__).parents[2]
# For a make of our own: what `make test ARGS=...` was started with is not for it.
_OF_MAKE = {"MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "ARGS", "NGPU", "PRESET", "TORCHRUN", "PY"}
MAKE_ENV = {name: value for name, value in os.environ.items() if name not in _OF_MAKE}
CROPS = "--global_crops_size 48 --global_crops_scale 0.5 1.0 --flip_prob 0.5 --backend auto".split()
STUDENT = """--patch_size 8 --embed_dim 48 --depth 2 --num_heads 2 --layer_scale 0.5 --local_crops_size 24
    --local_crops_number 3 --mask_patch_size 16 --num_prototypes 32 --prototype_rows 128 --prototype_iterations 3
    --koleo_warmup_steps 4 --warmup_epochs 0.2 --lr 4e-3 --no_compile --device cpu --num_threads 1 --log_every 1
    --knn_every_epochs 0 --term_gradients_every 0 --batch_size_per_gpu 16""".split()


@dataclass(frozen=True)
class Workplace:
    """Folders that the integration tests share, and the flags of a small run on them."""

    shards: Path
    val_shards: Path
    teacher: Path
    cache: Path

    def flags(self, run: Path, *more: object) -> list[str]:
        """Return train.py's arguments for a small run in `run`; later flags win."""
        base = ["--data_path", self.shards, "--output_dir", run, "--teacher_arch", f"local-dir:{self.teacher}"]
        return _last_wins([str(word) for word in [*base, *CROPS, *STUDENT, *more]])


def _last_wins(words: list[str]) -> list[str]:
    values: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name = word.removeprefix("--no_") if word.startswith("--no_") else word.removeprefix("--")
            values[name] = [word]
        else:
            values[name].append(word)
    return [word for group in values.values() for word in group]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    root = tmp_path_factory.mktemp("workplace")
    compose_images(root, train_per_scan=1, val_per_scan=1, seed=0)
    place = Workplace(root / "shards", root / "val", root / "teacher", root / "cache")
    pack(root / "images" / "val", place.shards, rows_per_shard=128, workers=1)
    pack(root / "images" / "val", place.val_shards, rows_per_shard=512, workers=1, seed=1)
    torch.manual_seed(0)
    args = {"embed_dim": 64, "depth": 2, "num_heads": 2, "init_values": 0.5, "img_size": 48}
    card = Card(
        name="teacher", student_arch="vit_small", teacher_arch="random", licence="MIT", step=0, ema=False,
        img_size=48, probe=None,
    )  # fmt: skip
    export_model(create_backbone("vit_small", patch_size=8, model_args=args).eval(), place.teacher, card=card)
    build = ["build", "--shards", place.shards, "--cache", place.cache, "--view_sets", 2, "--device", "cpu"]
    status = cache_tools([str(w) for w in [*build, "--teacher_arch", f"local-dir:{place.teacher}", *CROPS]])
    assert status == 0
    return place


@pytest.fixture
def run_here() -> Iterator[Callable[[list[str]], list[dict[str, Any]]]]:
    """Train in this process; return the lines of metrics.jsonl."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}

    def run(flags: list[str]) -> list[dict[str, Any]]:
        config = parse_config(flags)
        with process_group(config.runtime) as ranks:
            train.train(config, ranks)
        return read_lines(Path(config.runtime.output_dir))

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def read_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Train in N real processes under torchrun."""

    def run(ranks: int, flags: list[str]) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable, "-m", "distill.launch", "--standalone", "--nproc-per-node", str(ranks)]
        return subprocess.run(
            [*launcher, "train.py", *flags], cwd=ROOT, capture_output=True, text=True, check=False
        )

    return run
