"""Draws the figures: losses, target entropies, accuracies, patch features by their PCA, sheets of images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from common.errors import UserError
from common.files import write_atomic
from distill.evaluation.measures import fit_linear_map
from distill.step import TERMS

LOSS_TERMS = ("loss", *TERMS[:5])
ENTROPIES = ("dino_entropy", "dino_kl", "ibot_entropy", "ibot_kl")
DOTS_PER_INCH = 120

Record = dict[str, Any]


def read_metrics(path: str | Path) -> list[Record]:
    """Read a run's metrics.jsonl: one record a logged step, ascending.

    A step that was logged again after a resume counts as it was logged last. A last line that was cut by a
    crash is left out; a bad line elsewhere is an error.

    Raises:
        UserError: no such file, no record, or a damaged line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file. A training run writes it; train first, or give another run.")
    lines = path.read_text().split("\n")
    merged: dict[int, Record] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}: line {number} is not JSON ({line[:60]!r}). The file was damaged or edited. "
                "Remove that line, or restore the file."
            ) from error
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            merged.setdefault(record["step"], {}).update(record)
    if not merged:
        raise UserError(f"{path}: no logged step. The run stopped before its first log line; train on.")
    return [merged[step] for step in sorted(merged)]


def write_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all, the same bytes for the same figure."""
    FigureCanvasAgg(figure)
    # Without the version of matplotlib in its metadata, a PNG depends on its pixels alone.
    write_atomic(
        Path(path), lambda file: figure.savefig(file, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    )


def loss_figure(metrics: Sequence[Record]) -> Figure:
    """Each loss term over steps, unweighted, one panel a term; terms that no record has are left out."""
    present = _logged(metrics, LOSS_TERMS, "loss")
    columns = min(3, len(present))
    rows = -(-len(present) // columns)
    figure = Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, term in zip(axes, present, strict=False):
        _plot_series(axis, metrics, term, label=None)
        axis.set_title("total, weighted" if term == "loss" else term)
        axis.set_xlabel("step")
    for axis in axes[len(present) :]:
        axis.remove()
    return figure


def target_figure(metrics: Sequence[Record]) -> Figure:
    """Entropy H of the teacher's targets and KL from them to the student, over steps.

    Their sum is the cross-entropy that is minimised. H belongs to the teacher: only KL says whether the
    student learns.
    """
    present = _logged(metrics, ENTROPIES, "target")
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, suffix, title in zip(
        axes, ("_entropy", "_kl"), ("H of the teacher's targets", "KL to the student"), strict=True
    ):
        for name in present:
            if name.endswith(suffix):
                _plot_series(axis, metrics, name, label=name.removesuffix(suffix))
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylabel("nats")
        axis.legend()
    return figure


def accuracy_by_epoch_figure(
    metrics: Sequence[Record], *, key: str = "knn_top1", levels: Mapping[str, float] | None = None
) -> Figure:
    """Accuracy measured during training, by epoch.

    Args:
        metrics: records; those with `key` and `epoch` are drawn.
        key: name of the accuracy in percent.
        levels: horizontal lines to compare with, such as the teacher's and a random student's accuracy.
    """
    points = [(record["epoch"], record[key]) for record in metrics if key in record and "epoch" in record]
    if not points:
        raise UserError(
            f"accuracy figure: no record has {key!r}. The run measured no k-NN accuracy. Train with "
            "--val_data_path and --knn_every_epochs."
        )
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*points, strict=True), marker="o", color="C0", label="student")
    for index, (name, level) in enumerate((levels or {}).items(), start=1):
        axis.axhline(level, color=f"C{index}", linestyle="--", label=name)
    axis.set_xlabel("epoch")
    axis.set_ylabel("k-NN top-1, %")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def write_run_figures(metrics_path: Path, output: Path, *, levels: Mapping[str, float] | None = None) -> list[Path]:
    """Write a run's losses.png, targets.png and accuracy_by_epoch.png; those it logged nothing for are left out.

    Args:
        metrics_path: the run's metrics.jsonl; where there is none, nothing is written.
        output: folder to write to.
        levels: accuracies to compare with, by name; see `accuracy_by_epoch_figure`.

    Returns:
        The files written.
    """
    if not metrics_path.is_file():
        return []
    metrics = read_metrics(metrics_path)
    logged = set().union(*metrics)
    drawn = {}
    if not logged.isdisjoint(LOSS_TERMS):
        drawn["losses.png"] = loss_figure(metrics)
    if not logged.isdisjoint(ENTROPIES):
        drawn["targets.png"] = target_figure(metrics)
    if {"knn_top1", "epoch"} <= logged:
        drawn["accuracy_by_epoch.png"] = accuracy_by_epoch_figure(metrics, levels=levels)
    for name, figure in drawn.items():
        write_figure(figure, output / name)
    return [output / name for name in drawn]


def accuracy_bars_figure(accuracies: Mapping[str, Mapping[str, float]]) -> Figure:
    """Grouped bars: a group a measure, a bar a model.

    Args:
        accuracies: percent by measure, by model name; every model has the same measures.
    """
    names = list(accuracies)
    measures = list(next(iter(accuracies.values())))
    figure = Figure(figsize=(1.5 + 0.7 * len(names) * len(measures), 3.6), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        heights = [accuracies[name][measure] for measure in measures]
        places = np.arange(len(measures)) + (index - (len(names) - 1) / 2) * width
        bars = axis.bar(places, heights, width, label=name)
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    axis.set_xticks(range(len(measures)), measures)
    axis.set_ylabel("top-1, %")
    axis.set_ylim(0, 108)
    figure.legend(loc="outside upper center", ncols=len(names))
    return figure


def image_grid_figure(columns: Mapping[str, Sequence[npt.NDArray[Any]]], *, cell_inches: float = 1.4) -> Figure:
    """A sheet of pictures: a titled column a key, a row an item.

    Args:
        columns: pictures by title, uint8 or float in 0..1, [h, w, 3]; all columns of one length. Small ones
            (PCA maps) are enlarged without smoothing.
        cell_inches: side of a picture.
    """
    lengths = {len(pictures) for pictures in columns.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise UserError(
            f"image grid: columns of {sorted(len(p) for p in columns.values())} pictures. Give every column "
            "the same number of pictures, one at least."
        )
    num_rows = lengths.pop()
    size = (cell_inches * len(columns), cell_inches * num_rows + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(num_rows, len(columns), squeeze=False)
    for column, (title, pictures) in enumerate(columns.items()):
        for row, picture in enumerate(pictures):
            axis = axes[row, column]
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                axis.set_title(title, fontsize=9)
    return figure


# The range that colours span: outliers beyond it saturate, so that one patch does not grey the rest.
LOW, HIGH = 0.02, 0.98


@dataclass(frozen=True)
class PatchBasis:
    """Three principal components of the teacher's patch tokens, and their range.

    Attributes:
        mean: [d].
        components: unit rows, the strongest first, signs fixed, [3, d].
        low: score that becomes 0 in each channel, [3].
        high: score that becomes 1, [3].
    """

    mean: Float[Tensor, " d"]
    components: Float[Tensor, "3 d"]
    low: Float[Tensor, " 3"]
    high: Float[Tensor, " 3"]

    def scores(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n 3"]:
        """Coordinates in the basis."""
        return (tokens.float() - self.mean) @ self.components.T

    def colours(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n 3"]:
        """RGB in 0..1."""
        return ((self.scores(tokens) - self.low) / (self.high - self.low)).clamp(0, 1)


def fit_patch_basis(teacher_tokens: Float[Tensor, "b n d"]) -> PatchBasis:
    """Principal components of teacher patch tokens, with the same signs on every machine and run.

    A component's sign is that which makes its largest entry (by absolute value) positive.

    Args:
        teacher_tokens: patch tokens of some images; at least four tokens.

    Raises:
        UserError: fewer tokens or channels than three components need.
    """
    tokens = teacher_tokens.flatten(0, 1).double()
    if min(len(tokens) - 1, tokens.shape[1]) < 3:
        raise UserError(
            f"PCA: {len(tokens)} patch tokens of dimension {tokens.shape[1]}. Three components need four "
            "tokens and three dimensions. Give more images."
        )
    mean = tokens.mean(dim=0)
    centred = tokens - mean
    # The covariance is d x d whatever the number of tokens; eigenvalues ascend.
    components = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].T.flip(0)
    largest = components.abs().argmax(dim=1, keepdim=True)
    components = components * components.gather(1, largest).sign()
    scores = centred @ components.T
    low, high = (quantile(scores, share) for share in (LOW, HIGH))
    high = torch.maximum(high, low + torch.finfo(torch.float32).eps)
    return PatchBasis(mean.float(), components.float(), low.float(), high.float())


def quantile(scores: Float[Tensor, "n 3"], share: float) -> Float[Tensor, " 3"]:
    """The value below which `share` of each column lies, without torch.quantile's limit on the size."""
    ordered = scores.sort(dim=0).values
    return ordered[round(share * (len(ordered) - 1))]


def paint_patches(
    fit: Mapping[str, Float[Tensor, "b n d"]],
    shown: Mapping[str, Float[Tensor, "m n d"]],
    *,
    teacher: str,
    ridge: float = 1e-3,
) -> tuple[dict[str, Float[Tensor, "m n 3"]], list[str]]:
    """Paint several models' patch tokens in one basis, the teacher's.

    Args:
        fit: patch tokens by model over images that basis and maps are fitted on.
        shown: patch tokens by model over other images, to be painted.
        teacher: the key of the model whose basis it is.
        ridge: of the maps to the teacher; see `fit_linear_map`.

    Returns:
        (RGB in 0..1 by model, the teacher first; models left out because their patch grid is another).
    """
    basis = fit_patch_basis(fit[teacher])
    colours = {teacher: basis.colours(shown[teacher])}
    left_out = []
    for name, tokens in fit.items():
        if name == teacher:
            continue
        if tokens.shape[1] != fit[teacher].shape[1]:
            left_out.append(name)
            continue
        # Fitted on images other than those shown: a map with more coefficients than tokens would paint the
        # teacher's picture from any features.
        mapping = fit_linear_map(tokens.flatten(0, 1), fit[teacher].flatten(0, 1), ridge=ridge)
        colours[name] = basis.colours(mapping(shown[name]))
    return colours, left_out


def patch_pca_figure(crops: UInt8[Tensor, "b h w 3"], colours: Mapping[str, Float[Tensor, "b n 3"]]) -> Figure:
    """Images, and beside them each model's patch features painted by the teacher's principal components.

    Args:
        crops: the images, uint8.
        colours: RGB of each patch in 0..1 by model, row-major over a square grid.
    """
    columns: dict[str, Sequence[npt.NDArray[Any]]] = {"image": list(crops.cpu().numpy())}
    for name, values in colours.items():
        side = round(values.shape[1] ** 0.5)
        assert side * side == values.shape[1], f"{name}: {values.shape[1]} patches are no square"
        columns[name] = list(values.unflatten(1, (side, side)).cpu().numpy())
    return image_grid_figure(columns)


def _logged(metrics: Sequence[Record], names: Sequence[str], figure: str) -> list[str]:
    present = [name for name in names if any(name in record for record in metrics)]
    if not present:
        raise UserError(f"{figure} figure: no record has any of {', '.join(names)}. Check metrics.jsonl.")
    return present


def _plot_series(axis: Axes, metrics: Sequence[Record], key: str, *, label: str | None) -> None:
    points = [(record["step"], record[key]) for record in metrics if record.get(key) is not None]
    axis.plot(*zip(*points, strict=True), linewidth=1.2, label=label)
    axis.grid(alpha=0.3)
