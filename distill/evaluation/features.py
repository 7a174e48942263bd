"""Runs frozen ViTs once over a stream of crops and keeps their cls tokens and mean patch tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from common.errors import UserError

Normalise = Callable[[Tensor], Tensor]


class LabelledCrops(Protocol):
    """What extraction needs of one batch of a crop stream."""

    @property
    def rows(self) -> npt.NDArray[np.int64]: ...

    @property
    def crops(self) -> UInt8[Tensor, "b h w 3"]: ...

    @property
    def labels(self) -> Int64[Tensor, " b"]: ...


@dataclass(frozen=True)
class FeatureModel:
    """A frozen model and how its input is made from uint8 NHWC crops.

    Attributes:
        model: a timm ViT with a cls token.
        normalise: uint8 [b, h, w, 3] to float [b, 3, h, w] on the same device.
    """

    model: nn.Module
    normalise: Normalise


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
    """Number of transformer blocks of a timm ViT."""
    return len(model.blocks)  # type: ignore[arg-type]


@torch.inference_mode()
def forward_features(
    model: nn.Module, images: Float[Tensor, "b 3 h w"], *, dtype: torch.dtype, layers: int
) -> list[tuple[Tensor, Tensor]]:
    """Final-norm tokens after the last `layers` blocks.

    Args:
        model: a timm ViT in eval mode.
        images: normalised images; cast to the dtype of the weights.
        dtype: compute dtype: below fp32, fp32 weights run under autocast.
        layers: number of last blocks.

    Returns:
        Per block, deepest last: (patch tokens [b, n, d], prefix tokens [b, p, d]), fp32.
    """
    weights_dtype = next(model.parameters()).dtype
    autocast = dtype != torch.float32 and weights_dtype == torch.float32
    with torch.autocast(images.device.type, dtype=dtype, enabled=autocast):
        blocks = model.forward_intermediates(  # type: ignore[operator]
            images.to(weights_dtype),
            indices=layers,
            norm=True,
            output_fmt="NLC",
            return_prefix_tokens=True,
            intermediates_only=True,
        )
    return [(patches.float(), prefix.float()) for patches, prefix in blocks]


def extract_features_of(
    models: Mapping[str, FeatureModel],
    crops: Iterable[LabelledCrops],
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
        UserError: the stream is empty, or a model has no cls token.
    """
    for name, entry in models.items():
        if not getattr(entry.model, "num_prefix_tokens", 0):
            raise UserError(
                f"{name}: the model has no cls token (num_prefix_tokens is 0). The probe's features are the "
                "cls token and the mean patch token. Choose a ViT with a cls token."
            )
    training = {name: entry.model.training for name, entry in models.items()}
    chunks: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in models}
    labels: list[Tensor] = []
    rows: list[Tensor] = []
    try:
        for entry in models.values():
            entry.model.eval()
        for batch in crops:
            images = batch.crops.to(device, non_blocking=True)
            labels.append(batch.labels.cpu())
            rows.append(torch.from_numpy(np.asarray(batch.rows, dtype=np.int64)))
            for name, entry in models.items():
                chunks[name].append(_cls_and_mean(entry, images, dtype=dtype, layers=layers))
    finally:
        for name, entry in models.items():
            entry.model.train(training[name])
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
    crops: Iterable[LabelledCrops],
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
    was_training = entry.model.training
    try:
        entry.model.eval()
        patches, _ = forward_features(entry.model, entry.normalise(crops), dtype=dtype, layers=1)[-1]
    finally:
        entry.model.train(was_training)
    # Cloned outside inference mode: an inference tensor cannot enter a later computation with gradients.
    return patches.cpu().clone()


def _cls_and_mean(
    entry: FeatureModel, images: Tensor, *, dtype: torch.dtype, layers: int
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d"]]:
    layers = min(layers, model_depth(entry.model))
    blocks = forward_features(entry.model, entry.normalise(images), dtype=dtype, layers=layers)
    cls = torch.stack([prefix[:, 0] for _, prefix in blocks], dim=1)  # [b, l, d]
    return cls.cpu(), blocks[-1][0].mean(dim=1).cpu()
