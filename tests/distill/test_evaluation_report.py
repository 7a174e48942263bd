"""The report's gap, hash and table; the figures draw the numbers they are given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from common.errors import UserError
from distill.evaluation import figures
from distill.evaluation.linear import LinearProtocol, LinearResult
from distill.evaluation.report import (
    ModelReport,
    ProbeReport,
    Protocol,
    gap_closed,
    results_table,
    write_probe_json,
)


def a_protocol(**changes: Any) -> Protocol:
    protocol = Protocol(
        img_size=48,
        crop_ratio=0.875,
        compute_dtype="float32",
        knn_k=(10, 20),
        knn_temperature=0.07,
        layers=(1, 4),
        linear=LinearProtocol(),
        ridge=1e-3,
        train_data="a",
        val_data="b",
        train_rows=1000,
        val_rows=200,
        seed=0,
        backend="cpu",
    )
    return replace(protocol, **changes)


def a_model(name: str, knn: float, top1: float, **changes: Any) -> ModelReport:
    result = LinearResult("cls", top1, top1 - 1, 1e-3, at_grid_edge=False, unconverged=0)
    model = ModelReport(
        name=name,
        probed=name,
        detail="",
        num_parameters=1_500_000,
        knn={10: knn, 20: knn + 1},
        linear=[result],
        best=result,
        left_out=[],
        rankme=31.25,
        embed_dim=64,
        cosine=0.75,
    )
    return replace(model, **changes)


def test_patches_and_masks_have_their_columns_where_they_were_measured() -> None:
    scores = {"linear": 40.125, "knn": 35.5}
    student = a_model("student", 70, 74, patch_cosine=0.5, segmentation=scores)
    models = [student, a_model("teacher", 96, 96, cosine=None)]
    lines = results_table(a_report(models=models)).split("\n")
    assert lines[0].split()[-5:] == ["patches", "neighbours", "mIoU", "mIoU", "k-NN"]
    assert lines[2].split()[-3:] == ["0.500", "40.12", "35.50"]


def a_report(**changes: Any) -> ProbeReport:
    models = [a_model("student", 70, 74), a_model("teacher", 96, 96, cosine=None), a_model("random", 18, 30)]
    return replace(ProbeReport(a_protocol(), models), **changes)


def test_the_gap_is_the_share_of_the_way_from_random_to_teacher() -> None:
    assert gap_closed(70, 20, 95) == pytest.approx(100 * 50 / 75)
    assert gap_closed(98, 20, 95) == pytest.approx(104)
    assert gap_closed(10, 20, 95) == pytest.approx(-100 / 7.5)
    assert gap_closed(50, 60, 60) is None
    assert gap_closed(50, 60, float("nan")) is None
    gaps = a_report().gaps()
    expected = {"knn_10": 100 * 52 / 78, "knn_20": 100 * 52 / 78, "linear": 100 * 44 / 66}
    assert gaps == pytest.approx(expected)
    assert a_report(models=[a_model("student", 70, 74)]).gaps() == {}


def test_every_setting_of_the_protocol_changes_its_hash() -> None:
    base = a_protocol()
    assert base.sha256() == a_protocol().sha256()
    others = [
        a_protocol(img_size=64),
        a_protocol(knn_k=(20,)),
        a_protocol(layers=(1,)),
        a_protocol(val_data="c"),
        a_protocol(train_rows=999),
        a_protocol(linear=LinearProtocol(solver="sgd")),
        a_protocol(linear=LinearProtocol(held_out=0.2)),
        a_protocol(backend="dali"),
    ]
    assert len({protocol.sha256() for protocol in [base, *others]}) == 9


def test_the_table_shows_each_model_and_what_a_reader_must_know() -> None:
    edge = LinearResult("cls+mean", 60.0, 61.0, 1.0, at_grid_edge=True, unconverged=2)
    models = [
        a_model("student", 70, 74),
        a_model("teacher", 96, 96, cosine=None),
        a_model("random", 18, 30, linear=[edge], left_out=["cls, last 4"]),
    ]
    lines = results_table(a_report(models=models)).split("\n")
    header = "model parameters k-NN@10 k-NN@20 linear features RankMe cosine patches neighbours"
    assert lines[0].split() == header.split()
    assert lines[2].split() == ["student", "1.5", "M", "70.00", "71.00", "74.00", "cls", "31.2/64", "0.750"]
    assert lines[3].split() == ["teacher", "1.5", "M", "96.00", "97.00", "96.00", "cls", "31.2/64"]
    assert lines[5].split() == ["gap", "closed", "66.7", "%", "66.7", "%", "66.7", "%"]
    unlabelled = [replace(model, knn={}, linear=[], best=None, neighbours=62.5) for model in models[:1]]
    lines_of_none = results_table(a_report(models=unlabelled)).split("\n")
    assert lines_of_none[0].split() == "model parameters RankMe cosine patches neighbours".split()
    assert lines_of_none[2].split() == ["student", "1.5", "M", "31.2/64", "0.750", "62.5"]
    notes = "\n".join(lines[6:])
    assert "200 val images, 1000 train images, 48 px" in notes
    assert a_protocol().sha256()[:12] in notes
    assert "random: too few blocks for cls, last 4" in notes
    assert "random: chosen at the edge of the grid" in notes
    assert "random: 2 linear fits stopped short of the optimum" in notes
    assert "student: " not in notes


def test_probe_json_holds_the_report(tmp_path: Path) -> None:
    write_probe_json(a_report(), tmp_path / "probe.json")
    read = json.loads((tmp_path / "probe.json").read_text())
    assert read["protocol_sha256"] == a_protocol().sha256()
    assert read["protocol"]["linear"]["lbfgs"]["tolerance"] == 1e-2
    assert [model["name"] for model in read["models"]] == ["student", "teacher", "random"]
    assert read["models"][0]["knn"] == {"10": 70, "20": 71}
    assert read["models"][0]["best"]["top1"] == 74
    assert read["gap_closed_percent"]["linear"] == pytest.approx(100 * 44 / 66)


def some_metrics() -> list[figures.Record]:
    common = {"dino": 2.0, "dino_entropy": 1.5}
    steps: list[figures.Record] = [
        {"step": step, "epoch": step / 10, "loss": 5 - step / 10, "dino_kl": 1 / step, **common}
        for step in (10, 20, 30)
    ]
    steps[1]["knn_top1"] = 55.0
    steps[2]["knn_top1"] = 60.0
    return steps


def test_metrics_are_read_in_order_with_the_last_word_on_each_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "loss": 3}', '{"step": 2, "loss": 2}', '{"step": 1, "loss": 2.5}']
    path.write_text("\n".join([*lines, '{"step": 2, "knn_top1": 40, "epoch": 1}', "", '{"step": 3, "lo']))
    assert figures.read_metrics(path) == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": 2, "knn_top1": 40, "epoch": 1},
    ]


def test_damaged_or_missing_metrics_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(UserError, match="no such file"):
        figures.read_metrics(path)
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        figures.read_metrics(path)
    path.write_text('{"event": "start"}\n')
    with pytest.raises(UserError, match="no logged step"):
        figures.read_metrics(path)


def picture(axis: Any) -> Any:
    return axis.get_images()[0].get_array()


def lines_of(axis: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axis.get_lines()}


def test_the_loss_figure_has_a_panel_for_each_term_that_was_logged() -> None:
    figure = figures.loss_figure(some_metrics())
    assert [axis.get_title() for axis in figure.axes] == ["total, weighted", "dino"]
    assert list(lines_of(figure.axes[0]).values()) == [[(10, 4.0), (20, 3.0), (30, 2.0)]]
    with pytest.raises(UserError, match="no record has any of loss, dino"):
        figures.loss_figure([{"step": 1}])


def test_entropy_and_kl_are_drawn_apart() -> None:
    figure = figures.target_figure(some_metrics())
    entropy, divergence = figure.axes
    assert lines_of(entropy) == {"dino": [(10, 1.5), (20, 1.5), (30, 1.5)]}
    assert lines_of(divergence) == {"dino": [(10, 0.1), (20, 0.05), (30, 1 / 30)]}
    with pytest.raises(UserError, match="no record has any of dino_entropy"):
        figures.target_figure([{"step": 1}])


def test_accuracies_are_drawn_by_epoch_beside_their_levels() -> None:
    figure = figures.accuracy_by_epoch_figure(some_metrics(), levels={"teacher": 96.0})
    drawn = lines_of(figure.axes[0])
    assert drawn["student"] == [(2, 55), (3, 60)]
    assert {height for _, height in drawn["teacher"]} == {96}
    with pytest.raises(UserError, match="no record has 'knn_top1'"):
        figures.accuracy_by_epoch_figure([{"step": 1, "epoch": 1}])


def test_bars_have_the_heights_of_the_accuracies() -> None:
    accuracies = {"student": {"k-NN": 70.0, "linear": 74.0}, "teacher": {"k-NN": 96.0, "linear": 97.0}}
    figure = figures.accuracy_bars_figure(accuracies)
    heights = [[bar.get_height() for bar in group] for group in figure.axes[0].containers]
    assert heights == [[70, 74], [96, 97]]


def test_a_grid_shows_each_picture_in_its_place() -> None:
    pictures = {
        name: [np.full((2, 2, 3), value + row, np.uint8) for row in range(2)] for name, value in (("a", 10), ("b", 20))
    }
    figure = figures.image_grid_figure(pictures)
    shown = [int(picture(axis).max()) for axis in figure.axes]
    assert shown == [10, 20, 11, 21]
    assert [axis.get_title() for axis in figure.axes] == ["a", "b", "", ""]
    with pytest.raises(UserError, match=r"columns of \[1, 2\] pictures"):
        figures.image_grid_figure({"a": pictures["a"], "b": pictures["b"][:1]})


def test_patch_colours_keep_their_place_in_the_image() -> None:
    crops = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    colours = torch.arange(12, dtype=torch.float32).view(1, 4, 3) / 12
    figure = figures.patch_pca_figure(crops, {"teacher": colours})
    shown = picture(figure.axes[1])
    np.testing.assert_allclose(shown[0, 1], colours[0, 1])
    np.testing.assert_allclose(shown[1, 0], colours[0, 2])


def test_a_written_figure_is_a_png_and_the_same_bytes_twice(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        figures.write_figure(figures.loss_figure(some_metrics()), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert imread(tmp_path / "one.png").std() > 0.05  # something is drawn


def test_a_runs_figures_are_those_it_has_numbers_for(tmp_path: Path) -> None:
    assert figures.write_run_figures(tmp_path / "metrics.jsonl", tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    written = figures.write_run_figures(tmp_path / "metrics.jsonl", tmp_path)
    assert [path.name for path in written] == ["losses.png"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in some_metrics()))
    written = figures.write_run_figures(tmp_path / "metrics.jsonl", tmp_path, levels={"teacher": 96.0})
    assert [path.name for path in written] == ["losses.png", "targets.png", "accuracy_by_epoch.png"]
    assert all(path.is_file() for path in written)
