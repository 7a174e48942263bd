"""What the loader and single passes hand out: frozen dataclasses of crops, masks and identities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Which `b` images, and which crops of them.

    Attributes:
        rows: row numbers in the shard index, int64 [b].
        uids: 64-bit sample ids (blake2b-8 of the original relative name), uint64 [b].
        image_crcs: crc32c of each encoded JPEG, uint32 [b]; checked against the cache by the join.
        labels: class labels, -1 where unknown, int64 [b]. Never read by the losses.
        view_set: number of the view set that fixes the global boxes and flips.
        global_crops_spec: (top, left, height, width, flip, image_height << 16 | image_width) of each global
            crop, int32 [b, g, 6]; what a cache row must have been made from.
    """

    rows: npt.NDArray[np.int64]
    uids: npt.NDArray[np.uint64]
    image_crcs: npt.NDArray[np.uint32]
    labels: Int64[Tensor, " b"]
    view_set: int
    global_crops_spec: npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class CropBatch(ImageBatch):
    """A single pass' crops: the global ones as a teacher sees them, or one centre crop of each image.

    Attributes:
        crops: uint8 [g*b, G, G, 3], crop-major.
    """

    crops: UInt8[Tensor, "gb G G 3"]


@dataclass(frozen=True, kw_only=True)
class MultiCropBatch(ImageBatch):
    """One rank's share of a global batch: `b` images, `g` global and `l` local crops of each.

    Crops are crop-major: the first `b` rows of `global_crops` are the first global crop of every image.

    Attributes:
        epoch: epoch that draws photometrics, local crops and masks.
        global_crops: what the student sees, uint8 [g*b, G, G, 3].
        local_crops: uint8 [l*b, L, L, 3].
        teacher_crops: the global crops without photometric distortion, uint8 [g*b, G, G, 3]; None where
            the teacher's outputs come from a cache.
        masks: iBOT masks over the patch grid of the global crops, bool [g*b, n].
        masked_indices: flat indices of the masked patches into [g*b*n], ascending, int64 [m];
            m is the same for every batch.
    """

    epoch: int
    global_crops: UInt8[Tensor, "gb G G 3"]
    local_crops: UInt8[Tensor, "lb L L 3"]
    teacher_crops: UInt8[Tensor, "gb G G 3"] | None
    masks: Bool[Tensor, "gb n"]
    masked_indices: Int64[Tensor, " m"]


def normalise(
    crops: UInt8[Tensor, "b h w 3"],
    *,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Turn uint8 NHWC crops into normalised NCHW, in channels-last memory.

    Args:
        crops: uint8 [b, h, w, 3], RGB.
        mean: per-channel mean of the unit-range image.
        std: per-channel standard deviation of the unit-range image.
        dtype: dtype of the result; the arithmetic is fp32, so one compiled kernel does both.

    Returns:
        [b, 3, h, w] in `dtype`.
    """
    scale = torch.tensor([1 / (255 * s) for s in std], device=crops.device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=crops.device)
    return (crops.float() * scale + shift).to(dtype).movedim(-1, -3)
