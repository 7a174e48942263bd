"""Measurements of training: recipes compared over seeds on one cache and taken up again, the step on noise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.bench_train import BenchArgs, bench
from benchmarks.evidence import EvidenceArgs, gather, read_rows
from common.errors import UserError

from .conftest import Workplace


def test_recipes_are_compared_over_seeds_and_a_second_call_makes_what_is_missing(
    workplace: Workplace, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = workplace.flags(tmp_path, "--max_steps", 4)
    for name, length in (("--data_path", 2), ("--output_dir", 2), ("--teacher_arch", 2)):
        at = words.index(name)
        del words[at : at + length]
    args = EvidenceArgs(
        data="digits", train=str(workplace.shards), val=str(workplace.val_shards), cache=str(workplace.cache),
        recipes=("regression", "five --spd_loss_weight 2"), seeds=(0,), flags=" ".join(words),
        teacher=f"local-dir:{workplace.teacher}",
        probe_flags="--layers 1 --knn_k 5 --pca_images 0 --max_train_rows 100 --max_val_rows 50 --device cpu"
        f" --segmentation {workplace.shards.parent} --segmentation_images 40",
        output=str(tmp_path / "runs"), results=str(tmp_path / "evidence.csv"),
        page=str(tmp_path / "evidence.md"),
    )  # fmt: skip
    rows = gather(args)
    assert [(row["recipe"], row["seed"], row["steps"]) for row in rows] == [
        ("regression", "0", "4"), ("five --spd_loss_weight 2", "0", "4"),
    ]  # fmt: skip
    folder = tmp_path / "runs" / "digits_five_spd_loss_weight_2" / "0"
    report = json.loads((folder / "probe" / "probe.json").read_text())
    student = report["models"][0]
    assert float(rows[1]["knn"]) == pytest.approx(student["knn"]["5"], rel=1e-5)
    assert float(rows[1]["linear"]) == pytest.approx(student["best"]["top1"], rel=1e-5)
    assert float(rows[1]["patch_cosine"]) == pytest.approx(student["patch_cosine"], rel=1e-5)
    assert float(rows[1]["miou"]) == pytest.approx(student["segmentation"]["linear"], rel=1e-5)
    assert float(rows[0]["cpu_seconds"]) > 0 < float(rows[0]["images_per_second"])
    assert rows[0]["dino_kl"] == "" and float(rows[1]["dino_kl"]) > 0
    assert f"| `regression` | 4 | 1 | {float(rows[0]['knn']):.4g} (0) |" in capfd.readouterr().out

    page = (tmp_path / "evidence.md").read_text()
    assert "## digits\n" in page
    assert f"Teacher: knn {report['models'][1]['knn']['5']:.2f}, linear " in page
    assert f"| `regression` | 4 | 1 | {float(rows[0]['knn']):.4g} (0) |" in page
    assert (tmp_path / "evidence.png").read_bytes().startswith(b"\x89PNG")

    more = gather(replace(args, recipes=("regression",), seeds=(0, 1)))
    assert [row["seed"] for row in more] == ["0", "1"]
    assert more[0] == rows[0]
    assert len(read_rows(tmp_path / "evidence.csv")) == 3
    assert more[0]["knn"] != more[1]["knn"] or more[0]["cosine"] != more[1]["cosine"]


def test_a_recipe_that_fails_says_so_and_leaves_no_row(workplace: Workplace, tmp_path: Path) -> None:
    args = EvidenceArgs(
        data="digits", train=str(workplace.shards), val=str(workplace.val_shards), cache=str(workplace.cache),
        recipes=("sixth",), output=str(tmp_path / "runs"), results=str(tmp_path / "evidence.csv"),
        page=str(tmp_path / "evidence.md"),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"train.py --preset sixth ...` ended with status 2"):
        gather(args)
    assert read_rows(tmp_path / "evidence.csv") == []


@pytest.mark.parametrize("preset", ["recommended", "regression"])
def test_the_step_is_measured_by_phase_with_the_work_of_its_products(preset: str, tmp_path: Path) -> None:
    bench(BenchArgs(batch=(2,), preset=preset, only="eager", steps=2, device="cpu", results=tmp_path / "train.csv"))
    rows = read_rows(tmp_path / "train.csv")
    assert [row["row"].partition(", eager")[2] for row in rows] == ["", ": forward", ": backward", ": optimizer"]
    rate, *phases = (float(row["median"]) for row in rows)
    assert min(rate, *phases) > 0
    assert sum(float(row["min"]) for row in rows[1:]) <= 2e3 / float(rows[0]["min"])  # phases are parts of the step
    assert "GFLOP an image" in rows[0]["note"]
