"""Which backend is taken, why, and what happens without DALI."""

import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from pipeline import backend as backend_module
from pipeline.backend import choose_backend, default_num_threads, usable_cores
from pipeline.loader import open_loader

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def no_dali(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)


@pytest.fixture
def cuda_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_auto_takes_dali_where_it_is_installed():
    pytest.importorskip("nvidia.dali", reason="needs DALI: pip install nvidia-dali-cuda130")
    taken, reason = choose_backend("auto", CPU)
    assert taken == "dali"
    assert reason.startswith("DALI is installed; on a CPU the cpu backend is faster")


def test_auto_takes_the_cpu_backend_without_dali_and_says_why(no_dali):
    taken, reason = choose_backend("auto", CPU)
    assert taken == "cpu"
    assert reason.startswith("DALI cannot be imported")


def test_auto_takes_the_torch_backend_on_a_gpu_without_dali(no_dali, cuda_there):
    taken, reason = choose_backend("auto", torch.device("cuda"))
    assert taken == "torch"
    assert reason.startswith("DALI cannot be imported")


def test_dali_asked_for_and_absent_names_what_to_install(no_dali, shards, small):
    with pytest.raises(UserError, match=r"pip install nvidia-dali-cuda130") as caught:
        open_loader(shards, device="cpu", backend="dali", global_batch_size=8, seed=0, augmentation=small)
    assert "--backend cpu" in str(caught.value)


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_a_backend_asked_for_is_taken(name):
    assert choose_backend(name, CPU) == (name, "it was asked for")


def test_the_choice_is_logged_once_and_shown_by_the_loader(no_dali, shards, small, caplog):
    backend_module._log_once.cache_clear()
    arguments = {"device": "cpu", "global_batch_size": 8, "seed": 0, "augmentation": small, "num_threads": 1}
    with caplog.at_level(logging.INFO, logger="pipeline"):
        for _ in range(2):
            with open_loader(shards, backend="auto", **arguments) as loader:
                next(loader)
    assert loader.backend == "cpu"
    assert "DALI cannot be imported" in loader.backend_reason
    lines = [r.getMessage() for r in caplog.records if "crop backend" in r.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("crop backend: cpu on cpu: DALI cannot be imported")


@pytest.mark.parametrize(
    ("machine", "own", "ranks", "expected"),
    [
        (16, 16, 1, 12),
        (8, 8, 1, 8),
        (96, 96, 8, 12),
        (64, 64, 8, 8),
        (96, 48, 8, 12),  # bound to one of two NUMA nodes, with three others
        (96, 6, 8, 6),  # bound to fewer cores than its share
        (2, 2, 4, 1),
    ],
)
def test_default_threads_are_the_ranks_share_of_the_cores(monkeypatch, machine, own, ranks, expected):
    assert usable_cores() == len(os.sched_getaffinity(0))
    cores = {0: own, os.getppid(): machine}
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores[process]))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert default_num_threads() == expected


def test_the_whole_path_runs_where_dali_is_not_installed(shards):
    """In a fresh interpreter whose importer knows no `nvidia.dali`, as on macOS."""
    body = """
        import importlib.abc, sys

        class Absent(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.startswith("nvidia.dali"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Absent())
        import pipeline.loader, pipeline.dali, pipeline.torch_crops, pipeline.cpu_crops
        from pipeline.augmentation import named_augmentation
        from pipeline.loader import open_loader
        crops = named_augmentation("dino")
        with open_loader(sys.argv[1], device="cpu", global_batch_size=4, seed=0, augmentation=crops) as loader:
            print(loader.backend, tuple(next(loader).global_crops.shape))
        assert not [name for name in sys.modules if name.startswith("nvidia.dali")]
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body), str(shards)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "cpu (8, 224, 224, 3)"
