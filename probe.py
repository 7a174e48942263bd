"""Probe frozen features: k-NN and linear accuracy of student, teacher and random weights, and the gap closed.

`python probe.py --run RUN` reads shards and teacher from the run's config.json. It writes probe.json,
table.txt and figures to RUN/probe. Reads top to bottom: data, models, features, k-NN, linear probe, table,
figures.
"""

from __future__ import annotations

if __name__ == "__main__":
    from common.interrupt import end_at_interrupt

    end_at_interrupt()

import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import timm
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from common.device import pick_device
from common.errors import UserError, run_command
from common.files import write_atomic
from distill.config import TrainConfig, load_config
from distill.evaluation import figures
from distill.evaluation.features import (
    FeatureModel,
    Features,
    FeatureSet,
    ProbedModel,
    extract_features_of,
    extract_patch_tokens,
    feature_sets,
    load_probed,
    model_depth,
)
from distill.evaluation.linear import (
    LbfgsProtocol,
    LinearProtocol,
    LinearResult,
    best_result,
    linear_probe,
    subset_rows,
)
from distill.evaluation.logistic import SgdProtocol
from distill.evaluation.measures import (
    PATCH_IMAGES,
    TEMPERATURE,
    cosine_to_teacher,
    knn_accuracy,
    neighbours_kept,
    rankme,
)
from distill.evaluation.report import ModelReport, ProbeReport, Protocol, results_table, write_probe_json
from distill.evaluation.segmentation import MaskedImages, find_masked_images, segmentation_miou
from pipeline.backend import choose_backend
from pipeline.batch import CropBatch
from pipeline.readers import read_center_crops
from shards.manifest import load_index, load_manifest

RIDGE = 1e-3
DEFAULT_IMG_SIZE = 224


@dataclass(frozen=True)
class ProbeConfig:
    """Options of the probe."""

    run: str | None = None
    """Folder of a training run (its --output_dir)."""
    models: tuple[str, ...] = ("run", "teacher", "random")
    """Rows of the table: run, run:FOLDER, teacher, random, timm:NAME, timm:NAME@WEIGHTS or export:FOLDER."""
    train_shards: str | None = None
    """Labelled shards to fit on; the run's data_path by default."""
    val_shards: str | None = None
    """Labelled shards to score; the run's val_data_path by default."""
    output: str | None = None
    """Folder to write; RUN/probe by default."""
    img_size: int | None = None
    """Side of the centre crop in pixels; the run's global_crops_size by default, 224 without a run."""
    crop_ratio: float = 0.875
    """Side of the centre crop over the shorter side of the image."""
    knn_k: tuple[int, ...] = (10, 20)
    """Numbers of neighbours."""
    layers: tuple[int, ...] = (1, 4)
    """Last blocks whose cls tokens the linear classifiers see."""
    protocol: Literal["lbfgs", "sgd"] = "lbfgs"
    """lbfgs: logistic regression over a grid of strengths. sgd: DINOv2's grid of learning rates."""
    regularisations: tuple[float, ...] = LbfgsProtocol().regularisations
    """Grid of lbfgs."""
    learning_rates: tuple[float, ...] = SgdProtocol().learning_rates
    """Grid of sgd, for 256 images a step."""
    epochs: int = SgdProtocol().epochs
    """Epochs of sgd."""
    batch_size: int = SgdProtocol().batch_size
    """Rows a step of sgd."""
    held_out: float = 0.1
    """Share of train that chooses strength, learning rate and feature set."""
    max_train_rows: int | None = None
    """Labelled training images to use, at most: a seeded sample."""
    max_val_rows: int | None = None
    """Labelled val images to use, at most: a seeded sample."""
    seed: int = 0
    """Seed of samples, the held-out part and the random weights."""
    ema: bool = True
    """Probe the EMA of the student where the run keeps one; --no_ema probes the trained weights."""
    feature_batch_size: int = 256
    """Images per forward pass."""
    backend: Literal["auto", "dali", "cpu", "torch"] = "auto"
    """Who decodes and crops."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute dtype of the forward passes: bf16 on GPUs by default, fp32 on CPUs. Classifiers are fp32."""
    pca_images: int = 6
    """Val images in the PCA figure, 64 at most; 0 for no figures at all."""
    segmentation: str | None = None
    """Folder of images and masks (ADE20K, Pascal VOC, or images/ and masks/) to segment from patch tokens."""
    segmentation_images: int = 2000
    """Images of train, and of val, to segment, at most: a seeded sample."""


@dataclass(frozen=True)
class ProbeData:
    """Labelled rows of train and val shards; all rows where train or val has no labels."""

    train_shards: Path
    val_shards: Path
    train_rows: npt.NDArray[np.int64]
    val_rows: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stage:
    """Where and how crops are read and models run."""

    config: ProbeConfig
    img_size: int
    device: torch.device
    dtype: torch.dtype
    backend: str
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the wall time of the block to `seconds`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def crops(self, shards: Path, rows: npt.NDArray[np.int64], what: str) -> Iterator[CropBatch]:
        """Centre crops of some rows, with a progress bar on a terminal."""
        batches = read_center_crops(
            shards,
            rows,
            size=self.img_size,
            crop_ratio=self.config.crop_ratio,
            backend=self.backend,
            device=self.device,
            batch_size=self.config.feature_batch_size,
        )
        with tqdm(total=len(rows), desc=what, unit=" images", disable=None) as progress:
            for batch in batches:
                yield batch
                progress.update(len(batch.labels))


def probe(config: ProbeConfig) -> ProbeReport:
    """Measure every model of the table and write probe.json, table.txt and the figures.

    Raises:
        UserError: bad options, shards of other classes, or what loading a model raises.
    """
    run = load_config(Path(config.run)) if config.run is not None else None
    output = output_folder(config)
    stage = make_stage(config, run)
    data = read_data(config, run)
    masked = read_masked_images(config)

    # Models: the student of the run, its teacher, random weights; all in fp32 weights, run at one dtype.
    linear = linear_protocol(config)
    size, device = stage.img_size, stage.device
    loaded = [
        load_probed(probed, run=config.run, img_size=size, device=device, seed=config.seed, use_ema=config.ema)
        for probed in config.models
    ]
    models = {model.name: model for model in loaded}
    if len(models) != len(loaded) or not models:
        raise UserError(f"--models {' '.join(config.models)}: name at least one model, and each one once.")

    sets = {name: feature_sets(config.layers, model_depth(model.entry.model)) for name, model in models.items()}

    # Features: every image is decoded once and seen by all models.
    entries = {name: model.entry for name, model in models.items()}
    with stage.timed("features"):
        train, val = (
            extract_features_of(
                entries,
                stage.crops(shards, rows, what),
                device=stage.device,
                dtype=stage.dtype,
                layers=max(config.layers),
            )
            for shards, rows, what in (
                (data.train_shards, data.train_rows, "train features"),
                (data.val_shards, data.val_rows, "val features"),
            )
        )

    with stage.timed("patches"):
        patches = compared_patches(entries, data, stage) if "teacher" in entries else None
    with stage.timed("segmentation"):
        miou = (
            segmentation_miou(entries, masked, size=size, seed=config.seed, device=device, dtype=stage.dtype)
            if masked
            else {}
        )

    # Measures: k-NN, linear probe, effective rank, cosines to the teacher; mean IoU where there are masks.
    reports = []
    for name, model in models.items():
        teacher = (train["teacher"], val["teacher"]) if "teacher" in models and name != "teacher" else None
        measured = measure(model, train[name], val[name], teacher, sets=sets[name], linear=linear, stage=stage)
        reports.append(replace(measured, patch_cosine=patch_cosine(patches, name), segmentation=miou.get(name)))

    # Report: json, table, figures.
    report = ProbeReport(
        protocol=make_protocol(config, data, stage, linear, masked),
        models=reports,
        seconds=stage.seconds,
        environment=environment(stage),
    )
    output.mkdir(parents=True, exist_ok=True)
    table = results_table(report)
    write_probe_json(report, output / "probe.json")
    write_atomic(output / "table.txt", f"{table}\n".encode())
    print(table)
    if config.pca_images:
        write_figures(report, patches, stage, output)
    print(f"written to {output}")
    return report


def measure(
    model: ProbedModel,
    train: Features,
    val: Features,
    teacher: tuple[Features, Features] | None,
    *,
    sets: tuple[list[FeatureSet], list[FeatureSet]],
    linear: LinearProtocol,
    stage: Stage,
) -> ModelReport:
    """All figures of one model.

    `teacher` holds the teacher's features of the same rows; `sets` the feature sets of the protocol that the
    model has, and those that it is too shallow for.
    """
    config, device = stage.config, stage.device
    present, left_out = sets
    train_cls, val_cls = train.cls[:, -1].to(device), val.cls[:, -1].to(device)
    knn: dict[int, float] = {}
    results: list[LinearResult] = []
    if min(int(train.labels.min()), int(val.labels.min())) >= 0:
        with stage.timed("knn"):
            knn = knn_accuracy(train_cls, train.labels.to(device), val_cls, val.labels.to(device), k=config.knn_k)
        with stage.timed("linear"):
            results = linear_probe(train, val, sets=present, protocol=linear, device=device)
    with stage.timed("label-free"):
        cosine = neighbours = None
        if teacher is not None:
            teacher_train, teacher_val = (tokens.cls[:, -1].to(device) for tokens in teacher)
            cosine = cosine_to_teacher(train_cls, teacher_train, val_cls, teacher_val, ridge=RIDGE)
            neighbours = neighbours_kept(train_cls, teacher_train, val_cls, teacher_val, k=config.knn_k[0])
        rank = rankme(val_cls)
    return ModelReport(
        name=model.name,
        probed=model.probed,
        detail=model.detail,
        num_parameters=model.num_parameters,
        knn=knn,
        linear=results,
        best=best_result(results) if results else None,
        left_out=[feature_set.name for feature_set in left_out],
        rankme=rank,
        embed_dim=model.embed_dim,
        cosine=cosine,
        neighbours=neighbours,
    )


@dataclass(frozen=True)
class ComparedPatches:
    """Patch tokens of the same images by each model, fp32 on the CPU: `fit` of train, `judged` of val.

    Attributes:
        fit, judged: [images, n, d] by model.
        crops: the val images, uint8 on the device.
    """

    fit: Mapping[str, Tensor]
    judged: Mapping[str, Tensor]
    crops: Tensor


def compared_patches(entries: Mapping[str, FeatureModel], data: ProbeData, stage: Stage) -> ComparedPatches:
    """Take patch tokens of some train and some val images."""
    both = []
    for shards, rows in ((data.train_shards, data.train_rows), (data.val_shards, data.val_rows)):
        some = rows[subset_rows(len(rows), limit=PATCH_IMAGES, seed=stage.config.seed)]
        crops = torch.cat([batch.crops for batch in stage.crops(shards, some, "patch tokens")]).to(stage.device)
        both.append((crops, {n: extract_patch_tokens(entry, crops, dtype=stage.dtype) for n, entry in entries.items()}))
    (_, fit), (crops, judged) = both
    return ComparedPatches(fit, judged, crops)


def patch_cosine(patches: ComparedPatches | None, name: str) -> float | None:
    """Cosine of a model's patch tokens to the teacher's, mapped linearly; None without one or on another grid."""
    if patches is None or name == "teacher" or patches.fit[name].shape[1] != patches.fit["teacher"].shape[1]:
        return None
    both = (tokens[which].flatten(0, 1) for tokens in (patches.fit, patches.judged) for which in (name, "teacher"))
    return cosine_to_teacher(*both, ridge=RIDGE)


def write_figures(report: ProbeReport, patches: ComparedPatches | None, stage: Stage, output: Path) -> None:
    """Accuracies; PCA of patch features if there is a teacher; the run's curves if there is a run."""
    ks = report.protocol.knn_k
    accuracies = {
        model.name: {**{f"k-NN@{k}": model.knn[k] for k in ks}, "linear": model.best.top1}
        for model in report.models
        if model.best is not None
    }
    if accuracies:
        figures.write_figure(figures.accuracy_bars_figure(accuracies), output / "accuracies.png")
    if patches is not None:
        figures.write_figure(pca_figure(patches, stage), output / "patch_pca.png")
    if stage.config.run is not None:
        compared = [model for model in report.models if model.name in ("teacher", "random") and model.knn]
        levels = {model.name: model.knn[ks[-1]] for model in compared}
        figures.write_run_figures(Path(stage.config.run) / "metrics.jsonl", output, levels=levels)


def pca_figure(patches: ComparedPatches, stage: Stage) -> Figure:
    """Val images beside each model's patch features, painted in the teacher's principal components.

    Basis and maps are fitted on train images, none of them shown.
    """
    shown = {name: tokens[: stage.config.pca_images] for name, tokens in patches.judged.items()}
    colours, left_out = figures.paint_patches(patches.fit, shown, teacher="teacher", ridge=RIDGE)
    if left_out:
        print(f"not in patch_pca.png, another patch grid than the teacher's: {', '.join(left_out)}")
    return figures.patch_pca_figure(patches.crops[: stage.config.pca_images], colours)


def read_masked_images(config: ProbeConfig) -> MaskedImages | None:
    """Find the images and masks of `--segmentation`."""
    if config.segmentation is None:
        return None
    return find_masked_images(Path(config.segmentation)).sampled(config.segmentation_images, config.seed)


def make_stage(config: ProbeConfig, run: TrainConfig | None) -> Stage:
    """Resolve image size, device, dtype and backend."""
    device = pick_device(config.device)
    low = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    default_size = run.data.global_crops_size if run is not None else DEFAULT_IMG_SIZE
    return Stage(
        config=config,
        img_size=config.img_size or default_size,
        device=device,
        dtype=torch.bfloat16 if low else torch.float32,
        backend=choose_backend(config.backend, device)[0],
    )


def output_folder(config: ProbeConfig) -> Path:
    """Where the report goes; UserError where neither a run nor a folder was given."""
    if config.output is None and config.run is None:
        raise UserError("Neither --run nor --output was given: nowhere to write. Add --output FOLDER.")
    return Path(config.output) if config.output is not None else Path(config.run or "") / "probe"


def read_data(config: ProbeConfig, run: TrainConfig | None) -> ProbeData:
    """Find the shards and their labelled rows, and check that train and val have the same classes."""
    train = config.train_shards or (run.data.data_path if run is not None else None)
    val = config.val_shards or (run.data.val_data_path if run is not None else None)
    for name, given in (("train_shards", train), ("val_shards", val)):
        if not given:
            raise UserError(f"--{name}: not given, and no run names it. Pass a folder written by `make shards`.")
    assert train is not None and val is not None
    names = [load_manifest(folder).class_names for folder in (train, val)]
    of_labels = [np.flatnonzero(load_index(folder).label >= 0) for folder in (train, val)]
    if not all(map(len, of_labels)):
        print("without labels in train and val: no accuracies, but the measures that need none")
        of_labels = [np.arange(load_manifest(folder).num_rows) for folder in (train, val)]
    elif names[0] != names[1]:
        raise UserError(
            f"{train} has {len(names[0])} classes, {val} has {len(names[1])}, and they are not the same list. "
            "Labels would not mean the same. Pack both with the same classes."
        )
    limits = (config.max_train_rows, config.max_val_rows)
    rows = [
        of[subset_rows(len(of), limit=limit, seed=config.seed)] for of, limit in zip(of_labels, limits, strict=True)
    ]
    if max(config.knn_k, default=0) > len(rows[0]):
        raise UserError(
            f"--knn_k {config.knn_k}: {train} gives {len(rows[0])} labelled rows, too few neighbours. "
            "Choose a smaller k."
        )
    return ProbeData(Path(train), Path(val), rows[0], rows[1])


def linear_protocol(config: ProbeConfig) -> LinearProtocol:
    """The linear probe's settings from the flags."""
    return LinearProtocol(
        solver=config.protocol,
        held_out=config.held_out,
        seed=config.seed,
        lbfgs=LbfgsProtocol(regularisations=config.regularisations),
        sgd=SgdProtocol(config.learning_rates, config.epochs, config.batch_size),
    )


def make_protocol(
    config: ProbeConfig, data: ProbeData, stage: Stage, linear: LinearProtocol, masked: MaskedImages | None
) -> Protocol:
    """What decided the figures."""
    return Protocol(
        img_size=stage.img_size,
        crop_ratio=config.crop_ratio,
        compute_dtype=str(stage.dtype).removeprefix("torch."),
        knn_k=config.knn_k,
        knn_temperature=TEMPERATURE,
        layers=config.layers,
        linear=linear,
        ridge=RIDGE,
        train_data=load_manifest(data.train_shards).fingerprint(),
        val_data=load_manifest(data.val_shards).fingerprint(),
        train_rows=len(data.train_rows),
        val_rows=len(data.val_rows),
        seed=config.seed,
        backend=f"{stage.backend} on {stage.device.type}",
        masks=masked.fingerprint() if masked else None,
    )


def environment(stage: Stage) -> dict[str, str]:
    """Machine and versions; they decide rounding only."""
    on_gpu = stage.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(stage.device) if on_gpu else f"cpu {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def main() -> int:
    """Command line; returns the exit status."""
    description = (__doc__ or "").splitlines()[0]
    config = tyro.cli(ProbeConfig, prog="probe.py", use_underscores=True, description=description)
    return run_command(lambda: probe(config))


if __name__ == "__main__":
    sys.exit(main())
