"""The probe end to end on a small packed data set: every kind of model, the files it writes, and its errors."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import probe
from common.errors import UserError
from distill.checkpoint import CheckpointWriter
from distill.config import DataConfig, RuntimeConfig, StudentConfig, TeacherConfig, TrainConfig
from distill.evaluation.features import load_probed
from distill.export import Card, ExportArgs, export_model, export_run
from distill.models import create_backbone, create_student
from shards.pack import pack
from shards.sources import SourceOptions

IMG_SIZE = 32
WITHOUT_RUN: dict[str, Any] = {"run": None, "img_size": IMG_SIZE, "device": torch.device("cpu")}
STUDENT = StudentConfig(patch_size=8, embed_dim=32, depth=2, num_heads=2, layer_scale=1.0)


def write_images(folder: Path, *, per_class: int, seed: int, num_classes: int = 3) -> None:
    """JPEGs of mixed sizes whose dominant colour is their class, under noise."""
    random = np.random.default_rng(seed)
    for label in range(num_classes):
        (folder / f"class_{label}").mkdir(parents=True)
        for number in range(per_class):
            height, width = random.integers(36, 60, size=2)
            pixels = random.integers(0, 120, size=(height, width, 3))
            pixels[..., label] += 90
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class_{label}" / f"{number}.jpg")


@dataclass(frozen=True)
class Fixture:
    root: Path
    run: Path
    options: probe.ProbeConfig


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    """Shards, a teacher in a local folder, and a run whose student differs from its initialisation."""
    root = tmp_path_factory.mktemp("probe")
    for split, per_class, seed in (("train", 20, 1), ("val", 8, 2)):
        write_images(root / "images" / split, per_class=per_class, seed=seed)
        pack(root / "images" / split, root / split, rows_per_shard=32, workers=1, progress=False)
    torch.manual_seed(5)
    sizes = {"embed_dim": 48, "depth": 3, "num_heads": 3, "init_values": 1.0, "img_size": IMG_SIZE}
    teacher = create_backbone("vit_small", patch_size=8, model_args=sizes)
    card = Card("teacher", "vit_small", "none", "mit", step=0, ema=False, img_size=IMG_SIZE)
    export_model(teacher, root / "teacher", card=card)
    run = root / "run"
    config = TrainConfig(
        data=DataConfig(data_path=str(root / "train"), val_data_path=str(root / "val"), global_crops_size=IMG_SIZE),
        student=STUDENT,
        teacher=TeacherConfig(teacher_arch=f"local-dir:{root / 'teacher'}"),
    )
    run.mkdir()
    (run / "config.json").write_text(config.to_json())
    weights = {f"student.{name}": value for name, value in create_student(STUDENT, seed=77).state_dict().items()}
    writer = CheckpointWriter(run, RuntimeConfig(keep_checkpoints=1))
    writer.save(30, {"model": weights, "ema": None})
    writer.wait()
    (run / "metrics.jsonl").write_text('{"step": 10, "epoch": 0.5, "loss": 2.0, "knn_top1": 40.0}\n')
    options = probe.ProbeConfig(
        run=str(run), knn_k=(5,), layers=(1, 3), backend="cpu", device="cpu", feature_batch_size=16, pca_images=2
    )
    return Fixture(root, run, options)


def test_a_run_is_probed_with_its_teacher_and_random_weights(trained: Fixture) -> None:
    export_run(ExportArgs(run=str(trained.run)))
    models = ("run", "teacher", "random", f"export:{trained.run / 'export'}")
    report = probe.probe(replace(trained.options, models=models))
    student, teacher, random, exported = report.models
    assert [model.name for model in report.models[:3]] == ["student", "teacher", "random"]
    # Colour classes survive random ViTs.
    assert teacher.knn[5] == 100
    assert teacher.best.top1 == 100
    # The student is the checkpoint: its export has the very same figures, the random weights have others.
    assert (exported.knn, exported.linear, exported.rankme) == (student.knn, student.linear, student.rankme)
    assert random.rankme != student.rankme
    assert student.left_out == ["cls, last 3", "cls+mean, last 3"]
    assert [result.features for result in teacher.linear] == ["cls", "cls+mean", "cls, last 3", "cls+mean, last 3"]
    assert teacher.cosine is None
    assert student.cosine is not None
    assert 0 < student.cosine <= 1
    assert (report.protocol.train_rows, report.protocol.val_rows) == (60, 24)
    assert report.protocol.backend == "cpu on cpu"

    folder = trained.run / "probe"
    written = json.loads((folder / "probe.json").read_text())
    assert written["models"][0]["knn"]["5"] == student.knn[5]
    assert written["protocol_sha256"] == report.protocol.sha256()
    assert (folder / "table.txt").read_text().count("\n") >= 7
    names = {"accuracies.png", "patch_pca.png", "losses.png", "accuracy_by_epoch.png", "probe.json", "table.txt"}
    assert {path.name for path in folder.iterdir()} == names


def test_unlabelled_shards_are_probed_by_the_measures_that_need_no_labels(trained: Fixture) -> None:
    for split in ("train", "val"):
        source, output = trained.root / "images" / split, trained.root / f"{split}_unlabelled"
        pack(source, output, workers=1, progress=False, options=SourceOptions(labels="none"))
    models = ("run", "teacher", f"export:{trained.root / 'teacher'}")
    labelled = probe.probe(replace(trained.options, models=models, output=str(trained.root / "labelled")))
    folders = {f"{split}_shards": str(trained.root / f"{split}_unlabelled") for split in ("train", "val")}
    report = probe.probe(replace(trained.options, models=models, output=str(trained.root / "none"), **folders))
    assert (report.protocol.train_rows, report.protocol.val_rows) == (60, 24)
    for model, same in zip(report.models, labelled.models, strict=True):
        assert (model.knn, model.linear, model.best) == ({}, [], None)
        assert model.rankme == pytest.approx(same.rankme, rel=1e-5)
        assert model.name == "teacher" or model.cosine == pytest.approx(same.cosine, rel=1e-4)
        assert model.neighbours == same.neighbours
    student, _, teacher_again = report.models
    assert teacher_again.neighbours == 100 and teacher_again.cosine == pytest.approx(1, abs=1e-2)
    assert 100 * 5 / 60 < student.neighbours < 100  # above what chance keeps
    assert {path.name for path in (trained.root / "none").iterdir()} >= {"probe.json", "table.txt", "patch_pca.png"}


def test_a_probe_twice_gives_the_same_figures_and_a_smaller_one_another_hash(trained: Fixture) -> None:
    options = replace(trained.options, models=("run",), pca_images=0, output=str(trained.root / "again"))
    first, second = probe.probe(options), probe.probe(options)
    assert first.models == second.models
    assert first.protocol.sha256() == second.protocol.sha256()
    fewer = probe.probe(replace(options, max_train_rows=30, protocol="sgd", epochs=2, batch_size=16))
    assert fewer.protocol.train_rows == 30
    assert fewer.protocol.sha256() != first.protocol.sha256()
    assert {path.name for path in (trained.root / "again").iterdir()} == {"probe.json", "table.txt"}


def test_each_name_loads_the_weights_it_names(trained: Fixture) -> None:
    student = load_probed(f"run:{trained.run}", **WITHOUT_RUN)
    expected = create_student(STUDENT, seed=77).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in student.entry.model.state_dict().items())
    assert student.detail == "step 30"
    weights = trained.root / "teacher" / "model.safetensors"
    from_file = load_probed(f"timm:local-dir:{trained.root / 'teacher'}@{weights}", **WITHOUT_RUN)
    assert from_file.embed_dim == 48


@pytest.mark.parametrize("probed", ["student", "run:", "timm", "export:", "random:3", "teacher:x"])
def test_an_unknown_model_lists_the_known_ones(probed: str) -> None:
    with pytest.raises(UserError, match=r"not a model to probe. Give one of run, run:FOLDER, teacher"):
        load_probed(probed, **WITHOUT_RUN)


@pytest.mark.parametrize("probed", ["run", "teacher", "random"])
def test_a_model_that_needs_a_run_says_so(probed: str) -> None:
    with pytest.raises(UserError, match=rf"{probed!r}: it belongs to a run.*--run FOLDER"):
        load_probed(probed, **WITHOUT_RUN)


def test_bad_data_is_named(trained: Fixture, tmp_path: Path) -> None:
    write_images(tmp_path / "images", per_class=4, seed=3, num_classes=2)
    pack(tmp_path / "images", tmp_path / "two", rows_per_shard=32, workers=1, progress=False)
    with pytest.raises(UserError, match=r"has 3 classes, .* has 2, and they are not the same list"):
        probe.probe(replace(trained.options, val_shards=str(tmp_path / "two")))
    with pytest.raises(UserError, match="--train_shards: not given, and no run names it"):
        probe.probe(probe.ProbeConfig(output=str(tmp_path), device="cpu"))
    with pytest.raises(UserError, match="Neither --run nor --output"):
        probe.probe(probe.ProbeConfig())
    with pytest.raises(UserError, match=r"'run': its patches are 8 px, and the crops of 36 px.*multiple of 8"):
        probe.probe(replace(trained.options, img_size=36))
    with pytest.raises(UserError, match=r"--knn_k \(5, 61\): .*train gives 60 labelled rows"):
        probe.probe(replace(trained.options, knn_k=(5, 61)))
    with pytest.raises(UserError, match="each counts last blocks"):
        probe.probe(replace(trained.options, layers=(0, 1)))
    with pytest.raises(UserError, match="each one once"):
        probe.probe(replace(trained.options, models=("run", "run")))


def test_a_gpu_that_is_not_there_is_named(trained: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--device cuda: torch .* sees no CUDA device"):
        probe.probe(replace(trained.options, device="cuda"))


def test_the_command_prints_the_error_alone_and_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["probe.py", "--run", str(tmp_path), "--knn-k", "5", "--no_ema"])
    assert probe.main() == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'config.json'}: no such file")
    assert "Traceback" not in said
