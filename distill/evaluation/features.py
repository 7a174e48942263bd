"""The probe's models: found by name, and run once over a stream of crops for cls tokens and mean patch tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from common.errors import UserError
from distill.checkpoint import load_student
from distill.config import TeacherConfig, load_config
from distill.export import OF_NO_RELEASE, cached_teacher, student_detail, teacher_of_run
from distill.models import cls_and_patches, create_student, has_cls_token, patch_side, token_widths
from distill.teacher import LOCAL_DIR, load_teacher, load_teacher_of
from pipeline.batch import CropBatch, normalise

KINDS = "run, run:FOLDER, teacher, random, timm:NAME, timm:NAME@WEIGHTS or export:FOLDER"

Normalise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FeatureModel:
    """A frozen model and how its input is made from uint8 NHWC crops.

    Attributes:
        model: a timm model without a classifier.
        normalise: uint8 [b, h, w, 3] to float [b, 3, h, w] on the same device.
    """

    model: nn.Module
    normalise: Normalise


@dataclass(frozen=True)
class ProbedModel:
    """A model of the probe's table.

    Attributes:
        name: what the table calls it: "student", "teacher", "random", or as it was asked for.
        probed: as it was asked for.
        detail: which weights these are, in a few words.
        entry: the model in eval mode on the device, and its normalisation.
    """

    name: str
    probed: str
    detail: str
    entry: FeatureModel

    @property
    def embed_dim(self) -> int:
        """Width of its cls tokens."""
        return token_widths(self.entry.model)[0]

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the backbone."""
        return sum(parameter.numel() for parameter in self.entry.model.parameters())


def load_probed(
    probed: str, *, run: str | None, img_size: int, device: torch.device, seed: int = 0, use_ema: bool = True
) -> ProbedModel:
    """Load one model of the probe.

    Args:
        probed: `run` or `run:FOLDER` (student of a run), `teacher` (of the run), `random` (the run's student
            architecture with weights drawn from the seed), `timm:NAME` or `timm:NAME@WEIGHTS` (timm's own weights or
            a local file), `export:FOLDER` (an exported student).
        run: folder of the run that `run`, `teacher` and `random` belong to.
        img_size: side of the evaluated crops in pixels.
        device: where the model goes.
        seed: of random weights.
        use_ema: take the EMA of a run's student.

    Raises:
        UserError: unknown kind, no run, an image size that the patch size does not divide, or what the loader raises.
    """
    kind, _, rest = probed.partition(":")
    if probed in ("run", "teacher", "random"):
        if run is None:
            raise UserError(
                f"model {probed!r}: it belongs to a run, and none was given. Add --run FOLDER, or leave it "
                "out of --models."
            )
        rest = run
    elif kind not in ("run", "timm", "export") or not rest:
        raise UserError(f"model {probed!r}: not a model to probe. Give one of {KINDS}.")

    if kind == "run":
        student, meta = load_student(rest, use_ema=use_ema)
        detail, entry = student_detail(meta["step"], meta["ema"]), _student(student, device)
    elif kind == "random":
        student = create_student(load_config(Path(rest)).student, seed=seed)
        detail, entry = f"initialisation of seed {seed}", _student(student, device)
    else:
        cached = None
        if kind == "teacher":
            stated = load_config(Path(rest)).teacher
            cached = cached_teacher(Path(rest), stated)
            config = teacher_of_run(stated, cached)
            detail = config.teacher_arch
            if cached and detail.endswith(OF_NO_RELEASE):
                raise UserError(
                    f"model 'teacher': {rest} learned from a cache of {detail}, weights sha256 "
                    f"{cached['state_dict_sha256'][:12]}, and no flag of the run says where they lie. Leave teacher "
                    "out of --models, or give it as timm:NAME@WEIGHTS or export:FOLDER."
                )
        elif kind == "timm":
            arch, _, weights = rest.partition("@")
            config = TeacherConfig(teacher_arch=arch, teacher_pretrained_weights=weights or None)
            detail = weights or "timm's weights"
        else:
            config = TeacherConfig(teacher_arch=f"{LOCAL_DIR}{rest}", teacher_pretrained_weights=None)
            detail = "exported weights"
        # fp32 weights for every model of the table: the compute dtype is the probe's own, by autocast.
        if cached and cached["img_size"] == img_size:  # at another size, absolute positions are other weights
            teacher = load_teacher_of(config, cached, device=device)
        else:
            teacher = load_teacher(config, img_size=img_size, device=device, dtype=torch.float32)
        entry = FeatureModel(teacher.model, partial(normalise, mean=teacher.mean, std=teacher.std))

    patch = patch_side(entry.model)
    if img_size % patch:
        raise UserError(
            f"model {probed!r}: its patches are {patch} px, and the crops of {img_size} px do not divide "
            f"into them. Pass an --img_size that is a multiple of {patch}."
        )
    return ProbedModel("student" if probed == "run" else probed, probed, detail, entry)


def _student(model: nn.Module, device: torch.device) -> FeatureModel:
    return FeatureModel(model.to(device).eval().requires_grad_(False), normalise)


@dataclass(frozen=True)
class Features:
    """Final-norm features of `n` images, fp32 on the CPU.

    Attributes:
        cls: cls token after each of the last `l` blocks, deepest last, [n, l, d].
        patch_mean: mean of the last block's patch tokens (cls and registers left out), [n, d].
        labels: class labels, -1 where unknown, int64 [n].
        rows: row numbers in the shard index, int64 [n].
    """

    cls: Float[Tensor, "n l d"]
    patch_mean: Float[Tensor, "n d"]
    labels: Int64[Tensor, " n"]
    rows: Int64[Tensor, " n"]


@dataclass(frozen=True)
class FeatureSet:
    """Which features a linear classifier sees: the input of DINOv2's and DINOv3's linear evaluation.

    Attributes:
        blocks: cls tokens of this many last blocks, concatenated.
        patch_mean: whether the last block's mean patch token is appended.
    """

    blocks: int
    patch_mean: bool

    @property
    def name(self) -> str:
        tokens = "cls+mean" if self.patch_mean else "cls"
        return f"{tokens}, last {self.blocks}" if self.blocks > 1 else tokens

    def of(self, features: Features) -> Float[Tensor, "n w"]:
        """The concatenated features, [n, blocks * d (+ d)]."""
        available = features.cls.shape[1]
        if self.blocks > available:
            raise UserError(
                f"feature set {self.name!r}: {self.blocks} blocks are asked for, {available} were extracted. "
                f"Extract with layers={self.blocks}, or ask for fewer."
            )
        parts = [features.cls[:, available - self.blocks :].flatten(1)]
        if self.patch_mean:
            parts.append(features.patch_mean)
        return torch.cat(parts, dim=1)


def feature_sets(layers: Iterable[int], depth: int) -> tuple[list[FeatureSet], list[FeatureSet]]:
    """The feature sets of a protocol for a model of `depth` blocks.

    Returns:
        (the sets that the model has, the sets left out because it has fewer blocks).

    Raises:
        UserError: no layer is given, or one below 1.
    """
    layers = sorted(set(layers))
    if not layers or layers[0] < 1:
        raise UserError(f"--layers {layers}: each counts last blocks and must be at least 1. Use 1, or 1 4.")
    sets = [FeatureSet(n, patch_mean) for n in layers for patch_mean in (False, True)]
    return [s for s in sets if s.blocks <= depth], [s for s in sets if s.blocks > depth]


def model_depth(model: nn.Module) -> int:
    """Number of blocks of a timm ViT whose cls tokens can be taken; 1 for a model without a class token."""
    return len(model.blocks) if has_cls_token(model) else 1  # type: ignore[arg-type]


@torch.inference_mode()
def forward_features(
    entry: FeatureModel, crops: UInt8[Tensor, "b h w 3"], *, dtype: torch.dtype, layers: int
) -> list[tuple[Tensor, Tensor]]:
    """Final-norm tokens after the last `layers` blocks.

    Args:
        entry: a model in eval mode, and its normalisation.
        crops: uint8 crops on its device.
        dtype: compute dtype: below fp32, fp32 weights run under autocast.
        layers: number of last blocks; a model with fewer gives all it has.

    Returns:
        Per block, deepest last: (patch tokens [b, n, d], prefix tokens [b, p, d]), fp32. Of a model without a class
        token once, with its pooled features as the only prefix token.
    """
    model, images = entry.model, entry.normalise(crops)
    weights_dtype = next(model.parameters()).dtype
    autocast = dtype != torch.float32 and weights_dtype == torch.float32
    with torch.autocast(images.device.type, dtype=dtype, enabled=autocast):
        if not has_cls_token(model):
            pooled, patches = cls_and_patches(model, images.to(weights_dtype))
            return [(patches.float(), pooled[:, None].float())]
        blocks = model.forward_intermediates(  # type: ignore[operator]
            images.to(weights_dtype),
            indices=min(layers, model_depth(model)),
            norm=True,
            output_fmt="NLC",
            return_prefix_tokens=True,
            intermediates_only=True,
        )
    return [(patches.float(), prefix.float()) for patches, prefix in blocks]


def extract_features_of(
    models: Mapping[str, FeatureModel],
    crops: Iterable[CropBatch],
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    layers: int = 1,
) -> dict[str, Features]:
    """Run several models over one pass of a crop stream, so that each image is decoded once.

    Args:
        models: frozen models by name; put in eval mode, and back afterwards.
        crops: batches of uint8 crops, all of one size; the last may be partial.
        device: where the models are.
        dtype: compute dtype (fp32 weights run under autocast when it is lower).
        layers: number of last blocks whose cls token is kept; a model with fewer blocks gives all it has.

    Returns:
        Features of each model, rows in the order of the stream.

    Raises:
        UserError: the stream is empty.
    """
    chunks: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in models}
    labels: list[Tensor] = []
    rows: list[Tensor] = []
    with in_eval_mode(*(entry.model for entry in models.values())):
        for batch in crops:
            images = batch.crops.to(device, non_blocking=True)
            labels.append(batch.labels.cpu())
            rows.append(torch.from_numpy(np.asarray(batch.rows, dtype=np.int64)))
            for name, entry in models.items():
                blocks = forward_features(entry, images, dtype=dtype, layers=layers)
                cls = torch.stack([prefix[:, 0] for _, prefix in blocks], dim=1)  # [b, l, d]
                # Each copy waits for the device: features of a whole data set would not fit there.
                chunks[name].append((cls.cpu(), blocks[-1][0].mean(dim=1).cpu()))
    if not labels:
        raise UserError("The crop stream gave no batch: 0 rows to evaluate. Give at least one row.")
    return {
        name: Features(
            cls=torch.cat([cls for cls, _ in parts]),
            patch_mean=torch.cat([mean for _, mean in parts]),
            labels=torch.cat(labels),
            rows=torch.cat(rows),
        )
        for name, parts in chunks.items()
    }


def extract_features(
    model: nn.Module,
    crops: Iterable[CropBatch],
    *,
    normalise: Normalise,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    layers: int = 1,
) -> Features:
    """Run one model once over a crop stream; see `extract_features_of`."""
    entry = FeatureModel(model, normalise)
    return extract_features_of({"model": entry}, crops, device=device, dtype=dtype, layers=layers)["model"]


def extract_patch_tokens(
    entry: FeatureModel, crops: UInt8[Tensor, "b h w 3"], *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "b n d"]:
    """Final-norm patch tokens of a few images, fp32 on the CPU, for PCA pictures."""
    with in_eval_mode(entry.model):
        patches, _ = forward_features(entry, crops, dtype=dtype, layers=1)[-1]
    # Cloned outside inference mode: an inference tensor cannot enter a later computation with gradients.
    return patches.cpu().clone()


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models in eval mode, and back afterwards."""
    training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, was_training in zip(models, training, strict=True):
            model.train(was_training)
