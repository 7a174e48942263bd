"""The crop plan: every box, flip and photometric parameter of a batch as a pure function of identities.

Global boxes and flips depend on (uid, view set, seed); local crops, and the photometrics of all views, on
(uid, epoch, seed). With `teacher_photometric` the photometrics of the global crops depend on the view set.

Boxes follow torchvision's RandomResizedCrop: ten attempts at (area, aspect ratio), then a central crop. They
are decided by integer and correctly rounded float64 operations only (+, *, /, sqrt, rint, table look-up), so
they are the same on every machine; `PLAN_VERSION` counts changes of any bit of them.

Blocks of a view's counter (see `pipeline.philox`):

    0-4   box attempts 2i and 2i + 1: area, ratio, area, ratio
    5     top, left, flip, unused
    6     blur?, blur sigma, solarize?, unused
    7     jitter?, gray?, unused, unused
    8     brightness, contrast, saturation, hue
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from pipeline.augmentation import Augmentation
from pipeline.philox import Domain, UInt64Array, below, draw, happens, ratio, unit

PLAN_VERSION = 1

_ATTEMPT_BLOCKS = 5
_PLACE_BLOCK = 5
_PHOTOMETRIC_BLOCKS = np.arange(6, 9)

# NTSC luma and chroma. The chroma rows sum to zero, so gray stays gray under saturation and hue.
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)
_LUMA = np.outer(_FROM_YIQ[:, 0], _TO_YIQ[0])
_CHROMA = np.outer(_FROM_YIQ[:, 1], _TO_YIQ[1]) + np.outer(_FROM_YIQ[:, 2], _TO_YIQ[2])
_CHROMA_TURN = np.outer(_FROM_YIQ[:, 1], _TO_YIQ[2]) - np.outer(_FROM_YIQ[:, 2], _TO_YIQ[1])
_CONTRAST_CENTRE = 127.5


@dataclass(frozen=True)
class CropPlan:
    """What to do to each view of each image; views are the global crops, then the local ones.

    Attributes:
        boxes: top, left, height, width in pixels of the image, int32 [n, v, 4].
        flips: horizontal flip after the resize, bool [n, v].
        colour: affine map of RGB in 0..255, the last column is added, float32 [n, v, 3, 4].
        blur_sigma: sigma in pixels of the crop, 0 for none, float32 [n, v].
        solarize: invert values >= 128, bool [n, v].
    """

    boxes: npt.NDArray[np.int32]
    flips: npt.NDArray[np.bool_]
    colour: npt.NDArray[np.float32]
    blur_sigma: npt.NDArray[np.float32]
    solarize: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, images: slice | npt.NDArray[np.int64]) -> CropPlan:
        """The plan of some of the images: those of a slice, or at these positions."""
        return CropPlan(*(getattr(self, field.name)[images] for field in fields(self)))


def crop_plan(
    uids: npt.ArrayLike,
    sizes: npt.ArrayLike,
    *,
    view_set: int,
    epoch: int,
    seed: int,
    augmentation: Augmentation,
) -> CropPlan:
    """Plan all views of a batch.

    Args:
        uids: sample ids, uint64 [n].
        sizes: height and width of each image, integers [n, 2].
        view_set: fixes the global boxes and flips.
        epoch: draws local crops and photometrics.
        seed: 64-bit seed.
        augmentation: ranges and probabilities.

    Returns:
        The plan of `augmentation.num_crops` views an image.

    Raises:
        UserError: a size is not positive, or shapes do not match.
    """
    ids, hw = _checked(uids, sizes)
    g, a = augmentation.num_global_crops, augmentation
    views_global, views_local = np.arange(g), np.arange(g, a.num_crops)
    fixed = _Stream(seed, Domain.FIXED, view_set)
    fresh = _Stream(seed, Domain.FRESH, epoch)
    boxes, flips = _geometry(ids, hw, views_global, fixed, a.global_crops_scale, a)
    parts = _photometrics(ids, views_global, fixed if a.teacher_photometric else fresh, a)
    if len(views_local):
        local_boxes, local_flips = _geometry(ids, hw, views_local, fresh, a.local_crops_scale, a)
        boxes = np.concatenate([boxes, local_boxes], 1)
        flips = np.concatenate([flips, local_flips], 1)
        local_parts = _photometrics(ids, views_local, fresh, a)
        parts = tuple(np.concatenate(pair, 1) for pair in zip(parts, local_parts, strict=True))
    colour, sigma, solarize = parts
    return CropPlan(boxes, flips, colour.astype(np.float32), sigma.astype(np.float32), solarize.astype(bool))


def center_crop_plan(sizes: npt.ArrayLike, *, crop_ratio: float = 0.875) -> CropPlan:
    """Plan one view: the centred square of `crop_ratio` times the shorter side; no flip, no photometrics.

    Args:
        sizes: height and width of each image, integers [n, 2].
        crop_ratio: 0.875 is ImageNet's resize to 256, then crop of 224.

    Raises:
        UserError: a size is not positive, or the ratio is not in (0, 1].
    """
    if not 0 < crop_ratio <= 1:
        raise UserError(f"centre crop: crop_ratio is {crop_ratio}. It must be in (0, 1]. Change crop_ratio.")
    _, hw = _checked(np.zeros(len(np.asarray(sizes)), np.uint64), sizes)
    side = np.maximum(np.rint(hw.min(1) * crop_ratio).astype(np.int64), 1)
    corner = (hw - side[:, None]) // 2
    boxes = np.stack([corner[:, 0], corner[:, 1], side, side], -1).astype(np.int32)[:, None]
    return undistorted(CropPlan(boxes, np.zeros((len(hw), 1), bool), *_identity(len(hw), 1)))


def undistorted(plan: CropPlan) -> CropPlan:
    """The same boxes and flips without colour, blur or solarize."""
    return CropPlan(plan.boxes, plan.flips, *_identity(*plan.flips.shape))


def global_crops_spec(plan: CropPlan, sizes: npt.ArrayLike, num_global: int) -> npt.NDArray[np.int32]:
    """What a cached teacher output must have been made from.

    Args:
        plan: the plan of n images.
        sizes: height and width of each image, integers [n, 2], below 65536.
        num_global: number of global crops, g.

    Returns:
        int32 [n, g, 6]: top, left, height, width, flip, and the bits of image_height << 16 | image_width.
    """
    hw = np.asarray(sizes).astype(np.uint32)
    spec = np.empty((len(plan), num_global, 6), np.int32)
    spec[..., :4] = plan.boxes[:, :num_global]
    spec[..., 4] = plan.flips[:, :num_global]
    spec[..., 5] = (hw[:, 0] << np.uint32(16) | hw[:, 1]).view(np.int32)[:, None]
    return spec


def box_test_vector(seed: int, augmentation: Augmentation, view_set: int = 0) -> str:
    """Sha256 hex of the global boxes and flips of 1000 fixed ids and image sizes from 1 to 2000 pixels."""
    i = np.arange(1000, dtype=np.uint64)
    uids = (i + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    sizes = np.stack([1 + i * np.uint64(7919) % np.uint64(2000), 1 + i * np.uint64(104729) % np.uint64(2000)], -1)
    plan = crop_plan(uids, sizes, view_set=view_set, epoch=0, seed=seed, augmentation=augmentation)
    g = augmentation.num_global_crops
    digest = hashlib.sha256(np.ascontiguousarray(plan.boxes[:, :g], "<i4").tobytes())
    digest.update(np.ascontiguousarray(plan.flips[:, :g], np.uint8).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Stream:
    """Where a group of views draws from."""

    seed: int
    domain: Domain
    index: int

    def draw(self, uids: UInt64Array, views: npt.ArrayLike, blocks: npt.ArrayLike) -> UInt64Array:
        return draw(uids, views, blocks, seed=self.seed, domain=self.domain, index=self.index)


def _checked(uids: npt.ArrayLike, sizes: npt.ArrayLike) -> tuple[UInt64Array, npt.NDArray[np.int64]]:
    ids, hw = np.asarray(uids, np.uint64), np.asarray(sizes).astype(np.int64)
    if ids.ndim != 1 or hw.shape != (len(ids), 2):
        raise UserError(
            f"crop plan: {ids.shape} ids and sizes of shape {hw.shape}. A size is (height, width). "
            "Pass uids [n] and sizes [n, 2]."
        )
    if len(hw) and (hw.min() < 1 or hw.max() > 65535):
        bad = hw[((hw < 1) | (hw > 65535)).any(1)][0]
        raise UserError(
            f"crop plan: an image of {bad[0]} x {bad[1]} pixels. A JPEG has from 1 to 65535 a side. "
            "Run `make verify-shards` to find what is wrong with the index."
        )
    return ids, hw


def _geometry(
    uids: UInt64Array,
    sizes: npt.NDArray[np.int64],
    views: npt.NDArray[np.int64],
    stream: _Stream,
    scale: tuple[float, float],
    a: Augmentation,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    n, v = len(uids), len(views)
    h = np.broadcast_to(sizes[:, 0, None], (n, v))
    w = np.broadcast_to(sizes[:, 1, None], (n, v))
    first = stream.draw(uids[:, None], views, 0).reshape(n, v, 2, 2)
    box_h, box_w, found = _first_fit(first, h, w, scale, a)
    # Most boxes fit at once, so the other attempts are drawn for the rest only.
    i, j = np.nonzero(~found)
    if len(i):
        blocks = np.arange(1, _ATTEMPT_BLOCKS)
        more = stream.draw(uids[i][:, None], views[j][:, None], blocks).reshape(len(i), -1, 2)
        box_h[i, j], box_w[i, j], found[i, j] = _first_fit(more, h[i, j], w[i, j], scale, a)
    low, high = a.aspect_ratio
    shape = w / h
    central_h = np.where(shape < low, np.maximum(np.rint(w / low), 1), h).astype(np.int64)
    central_w = np.where(shape > high, np.maximum(np.rint(h * high), 1), w).astype(np.int64)
    box_h = np.where(found, box_h, central_h)
    box_w = np.where(found, box_w, central_w)
    place = stream.draw(uids[:, None], views, _PLACE_BLOCK)
    top = np.where(found, below(place[..., 0], h - box_h + 1), (h - box_h) // 2)
    left = np.where(found, below(place[..., 1], w - box_w + 1), (w - box_w) // 2)
    boxes = np.stack([top, left, box_h, box_w], -1).astype(np.int32)
    return boxes, happens(place[..., 2], a.flip_prob)


def _first_fit(
    attempts: UInt64Array,
    h: npt.NDArray[np.int64],
    w: npt.NDArray[np.int64],
    scale: tuple[float, float],
    a: Augmentation,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Height and width of the first attempt [..., k, 2] that fits its image, and whether there was one."""
    h, w = h[..., None], w[..., None]
    area = (h * w) * (scale[0] + (scale[1] - scale[0]) * unit(attempts[..., 0]))
    aspect = ratio(attempts[..., 1], *a.aspect_ratio)
    box_w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    box_h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (box_w > 0) & (box_h > 0) & (box_w <= w) & (box_h <= h)
    which = fits.argmax(-1)[..., None]
    picked_h = np.take_along_axis(box_h, which, -1)[..., 0]
    picked_w = np.take_along_axis(box_w, which, -1)[..., 0]
    return picked_h, picked_w, np.asarray(fits.any(-1))


def _identity(n: int, v: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    colour = np.zeros((n, v, 3, 4), np.float32)
    colour[..., :3] = np.eye(3, dtype=np.float32)
    return colour, np.zeros((n, v), np.float32), np.zeros((n, v), bool)


def _photometrics(
    uids: UInt64Array, views: npt.NDArray[np.int64], stream: _Stream, a: Augmentation
) -> tuple[npt.NDArray[np.float64 | np.bool_], ...]:
    """Colour [n, v, 3, 4], blur sigma [n, v] and solarize [n, v] of some views."""
    words = stream.draw(uids[:, None, None], views[:, None], _PHOTOMETRIC_BLOCKS)
    local = a.num_crops - a.num_global_crops
    blur_prob = np.array([*a.blur_prob_global, *[a.blur_prob_local] * local])[views]
    solarize_prob = np.array([*a.solarize_prob_global, *[0.0] * local])[views]
    low, high = a.blur_sigma
    sigma = low + (high - low) * unit(words[:, :, 0, 1])
    sigma = np.where(happens(words[:, :, 0, 0], blur_prob), sigma, 0.0)
    solarize = happens(words[:, :, 0, 2], solarize_prob)
    return _colour(words[:, :, 1], words[:, :, 2], a), sigma, solarize


def _colour(whether: UInt64Array, strengths: UInt64Array, a: Augmentation) -> npt.NDArray[np.float64]:
    """Compose saturation and hue (or gray), then brightness, then contrast about mid-gray."""
    jitter = happens(whether[..., 0], a.jitter_prob)
    centred = np.where(jitter[..., None], 2.0 * unit(strengths) - 1.0, 0.0)
    brightness = 1.0 + a.brightness * centred[..., 0]
    contrast = 1.0 + a.contrast * centred[..., 1]
    saturation = 1.0 + a.saturation * centred[..., 2]
    angle = 2.0 * np.pi * a.hue * centred[..., 3]
    chroma = np.where(happens(whether[..., 1], a.gray_prob), 0.0, saturation)
    gain = brightness * contrast
    out = np.empty((*gain.shape, 3, 4))
    out[..., :3] = (
        gain[..., None, None] * _LUMA
        + (gain * chroma * np.cos(angle))[..., None, None] * _CHROMA
        + (gain * chroma * np.sin(angle))[..., None, None] * _CHROMA_TURN
    )
    out[..., 3] = ((1.0 - contrast) * _CONTRAST_CENTRE)[..., None]
    return out
