"""The demo, end to end and very short, as its own command runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from demo import CROPS, STUDENT_FLAGS, crop_flags
from demo.inputs import compose_images
from distill.evaluation.segmentation import find_masked_images
from distill.runtime import parse_config
from shards.manifest import load_manifest

from .conftest import ROOT

SHORT = ["--teacher_steps", "12", "--steps", "12", "--train_per_scan", "1", "--val_per_scan", "1"]


def run_demo(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "demo", "--output", str(folder), *SHORT, *more],
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip


def test_the_demo_leaves_a_table_and_figures_and_a_second_call_repeats_nothing(tmp_path: Path) -> None:
    first = run_demo(tmp_path / "demo")
    assert first.returncode == 0, first.stderr[-3000:]
    table = (tmp_path / "demo" / "results.txt").read_text()
    report = json.loads((tmp_path / "demo" / "run" / "probe" / "probe.json").read_text())
    baseline = f"run:{tmp_path / 'demo' / 'regression'}"
    assert [model["name"] for model in report["models"]] == ["student", baseline, "teacher", "random"]
    assert all(model["segmentation"]["linear"] > 0 for model in report["models"])
    assert all(name in table for name in ("student", "teacher", "random", "gap closed", "seed 0"))
    figures = {path.name for path in (tmp_path / "demo" / "run" / "probe").glob("*.png")}
    assert figures >= {"losses.png", "targets.png", "accuracies.png", "patch_pca.png", "crops.png"}
    checkpoint = next((tmp_path / "demo" / "run" / "checkpoints").glob("*.pt"))
    before = (checkpoint.stat().st_mtime_ns, (tmp_path / "demo" / "teacher" / "model.safetensors").stat().st_mtime_ns)

    second = run_demo(tmp_path / "demo")
    assert second.returncode == 0, second.stderr[-3000:]
    after = (checkpoint.stat().st_mtime_ns, (tmp_path / "demo" / "teacher" / "model.safetensors").stat().st_mtime_ns)
    assert after == before

    other = run_demo(tmp_path / "demo", "--seed", "1")
    assert other.returncode == 2
    assert "this folder was begun with" in other.stderr


def test_no_scan_is_in_both_train_and_val_and_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train, val = compose_images(tmp_path / name, train_per_scan=1, val_per_scan=1, seed=3)
    assert train + val == 1797
    files = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*.*")}
    assert len(files) == 2 * 1797  # an image and a mask each
    assert files == {p.relative_to(tmp_path / "b"): p.read_bytes() for p in (tmp_path / "b").rglob("*.*")}
    scans = {split: {p.stem for p in files if p.parts[1] == split} for split in ("train", "val")}
    assert not scans["train"] & scans["val"]
    assert len({p.parts[2] for p in files if p.parts[1] == "val"}) == 10


def test_a_mask_holds_the_digit_and_all_of_its_ink(tmp_path: Path) -> None:
    compose_images(tmp_path, train_per_scan=1, val_per_scan=1, seed=3)
    for image, mask in find_masked_images(tmp_path).val[::40]:
        pixels, classes = np.asarray(Image.open(image)).max(2), np.asarray(Image.open(mask))
        assert set(np.unique(classes)) == {0, int(image.parent.name[-1]) + 1}
        assert pixels[classes == 0].max() < 128 < pixels[classes > 0].max()


def test_the_flags_of_the_demo_ask_for_its_own_crops() -> None:
    flags = [str(word) for word in crop_flags(3)]
    asked = parse_config([*flags, *STUDENT_FLAGS])
    assert asked.crops() == CROPS.crops(patch_size=8)
    assert asked.data.data_seed == 3
    crops = asked.crops()
    assert (crops.global_crops_size, crops.local_crops_size, crops.num_local_crops) == (48, 24, 4)
    assert (crops.global_crops_scale, crops.local_crops_scale) == ((0.5, 1.0), (0.3, 0.7))
    assert (crops.flip_prob, crops.mask_patch_size) == (0.0, 8)


def test_the_demo_set_packs_into_shards_with_ten_classes(tmp_path: Path) -> None:
    compose_images(tmp_path, train_per_scan=1, val_per_scan=1, seed=0)
    packed = subprocess.run(
        [sys.executable, "-m", "shards", "pack", "--source", tmp_path / "images" / "val", "--output", tmp_path / "s"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert packed.returncode == 0, packed.stderr
    assert load_manifest(tmp_path / "s").class_names == tuple(f"digit_{d}" for d in range(10))


def test_the_notebook_runs_from_first_to_last_cell(tmp_path: Path) -> None:
    cells = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for written, here in (('ROOT / "quickstart_run"', f"Path({str(tmp_path)!r})"), ("STEPS = 150", "STEPS = 8")):
        assert written in text
        text = text.replace(written, here)
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with Image.open(tmp_path / "neighbours.png") as figure:
        assert figure.size[0] > 300
