"""The probe's report: its protocol and hash, each model's figures, the gap closed, the table, probe.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common.files import json_sha256, write_atomic
from distill.evaluation.linear import LinearProtocol, LinearResult

PROTOCOL_VERSION = 2


@dataclass(frozen=True)
class Protocol:
    """All that decides a probe's figures, models apart. Figures compare only where the hash is the same.

    Attributes:
        img_size: side of the centre crop in pixels.
        crop_ratio: side of the crop over the shorter side of the image, before the resize.
        compute_dtype: dtype of the forward pass.
        knn_k: numbers of neighbours.
        knn_temperature: of the vote.
        layers: last blocks of the linear feature sets.
        linear: solver, grid and held-out part.
        ridge: of the map behind the cosine to the teacher.
        train_data, val_data: fingerprints of the shards.
        train_rows, val_rows: labelled images used.
        seed: of the sample where not all rows are used, and of random weights.
        backend: who decoded and cropped; backends differ by less than 0.2/255 a pixel.
        masks: fingerprint of the masks, if there are any.
        version: of this protocol.
    """

    img_size: int
    crop_ratio: float
    compute_dtype: str
    knn_k: tuple[int, ...]
    knn_temperature: float
    layers: tuple[int, ...]
    linear: LinearProtocol
    ridge: float
    train_data: str
    val_data: str
    train_rows: int
    val_rows: int
    seed: int
    backend: str
    masks: str | None = None
    version: int = PROTOCOL_VERSION

    def sha256(self) -> str:
        """Hash of the canonical JSON of all fields."""
        return json_sha256(asdict(self))


@dataclass(frozen=True)
class ModelReport:
    """One model's figures; accuracies in percent.

    Attributes:
        name: in the table.
        probed: as it was asked for.
        detail: which weights.
        num_parameters: of the backbone.
        knn: top-1 by k; empty without labels.
        linear: one result a feature set; none without labels.
        best: the feature set that the held-out part chose; None without labels.
        left_out: feature sets that the model has too few blocks for.
        rankme: effective rank of the val cls tokens.
        embed_dim: their width, the greatest effective rank possible.
        cosine: to the teacher's cls tokens after a linear map; None without a teacher, and for the teacher.
        patch_cosine: the same of patch tokens; None also where the grids differ.
        neighbours: share in percent of the teacher's nearest train images of a val image that it keeps, of the first k.
        segmentation: mean IoU in percent by protocol, `linear` and `knn`; None without masks.
    """

    name: str
    probed: str
    detail: str
    num_parameters: int
    knn: Mapping[int, float]
    linear: Sequence[LinearResult]
    best: LinearResult | None
    left_out: Sequence[str]
    rankme: float
    embed_dim: int
    cosine: float | None
    patch_cosine: float | None = None
    segmentation: Mapping[str, float] | None = None
    neighbours: float | None = None


@dataclass(frozen=True)
class ProbeReport:
    """A whole probe.

    Attributes:
        protocol: what decided the figures.
        models: in the order of the table.
        seconds: wall time by stage.
        environment: device, versions; they decide rounding only.
    """

    protocol: Protocol
    models: Sequence[ModelReport]
    seconds: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def gaps(self) -> dict[str, float | None]:
        """Share of the way from random to teacher that the student went, in percent, by measure.

        Empty where one of the three is not in the report, or without labels.
        """
        models = {model.name: model for model in self.models}
        if not {"student", "random", "teacher"} <= models.keys():
            return {}
        student, random, teacher = models["student"], models["random"], models["teacher"]
        if student.best is None or random.best is None or teacher.best is None:
            return {}
        gaps = {f"knn_{k}": gap_closed(student.knn[k], random.knn[k], teacher.knn[k]) for k in self.protocol.knn_k}
        gaps["linear"] = gap_closed(student.best.top1, random.best.top1, teacher.best.top1)
        return gaps


def gap_closed(student: float, random: float, teacher: float) -> float | None:
    """100 * (student - random) / (teacher - random); None where the teacher is not above random."""
    if not teacher > random:
        return None
    return 100 * (student - random) / (teacher - random)


def write_probe_json(report: ProbeReport, path: Path) -> None:
    """Write the report, the protocol's hash first, whole or not at all."""
    fields = {
        "protocol_sha256": report.protocol.sha256(),
        "protocol": asdict(report.protocol),
        "models": [asdict(model) for model in report.models],
        "gap_closed_percent": report.gaps(),
        "seconds": dict(report.seconds),
        "environment": dict(report.environment),
    }
    write_atomic(path, (json.dumps(fields, indent=2) + "\n").encode())


def results_table(report: ProbeReport) -> str:
    """The report as a text table: a row a model, the gap closed, and what a reader must know beside it."""
    ks = report.protocol.knn_k if any(model.knn for model in report.models) else ()
    header = ["model", "parameters", *(f"k-NN@{k}" for k in ks), *(("linear", "features") if ks else ())]
    header += ["RankMe", "cosine", "patches", "neighbours"]
    segmented = any(model.segmentation for model in report.models)
    header += ["mIoU", "mIoU k-NN"] if segmented else []
    rows = [
        [
            model.name,
            _count(model.num_parameters),
            *(f"{model.knn[k]:.2f}" for k in ks),
            *((f"{model.best.top1:.2f}", model.best.features) if model.best else ()),
            f"{model.rankme:.1f}/{model.embed_dim}",
            *("" if cosine is None else f"{cosine:.3f}" for cosine in (model.cosine, model.patch_cosine)),
            "" if model.neighbours is None else f"{model.neighbours:.1f}",
            *(f"{(model.segmentation or {}).get(name, math.nan):.2f}" for name in ("linear", "knn") if segmented),
        ]
        for model in report.models
    ]
    gaps = report.gaps()
    if gaps:
        cells = [_percent(gaps[f"knn_{k}"]) for k in ks]
        rows.append(["gap closed", "", *cells, _percent(gaps["linear"]), *[""] * (len(header) - len(ks) - 3)])
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    sides = ["<" if name in ("model", "features") else ">" for name in header]
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in [header, ["-" * width for width in widths], *rows]
    ]
    return "\n".join([*lines, *_notes(report)])


def _notes(report: ProbeReport) -> list[str]:
    protocol = report.protocol
    notes = [
        f"top-1 in percent on {protocol.val_rows} val images, {protocol.train_rows} train images, "
        f"{protocol.img_size} px; linear by {protocol.linear.solver}; protocol {protocol.sha256()[:12]}"
    ]
    for model in report.models:
        if model.left_out:
            notes.append(f"{model.name}: too few blocks for {'; '.join(model.left_out)}")
        edges = [result.features for result in model.linear if result.at_grid_edge]
        if edges:
            notes.append(f"{model.name}: chosen at the edge of the grid, a wider one may be better: {edges}")
        unconverged = sum(result.unconverged for result in model.linear)
        if unconverged:
            notes.append(f"{model.name}: {unconverged} linear fits stopped short of the optimum")
    return notes


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"


def _percent(share: float | None) -> str:
    return "-" if share is None or not math.isfinite(share) else f"{share:.1f} %"
