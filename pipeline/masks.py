"""iBOT masks: random blocks over mask units, an exact count, a pure function of (uid, epoch, seed).

Blocks are drawn as in BEiT (Bao et al., 2021, `masking_generator.py`): target area uniform between
`mask_min_units` and what is left to mask, log-uniform aspect ratio, kept where it adds at least one unit and
at most what is left. What the attempts leave over is filled with single random units, so the count is exact.

Blocks of a view's counter (see `pipeline.philox`), domain MASK:

    0       which global crop is masked (drawn at view 0)
    1-40    block attempts: area, ratio, top, left
    64-     one word a unit: the order in which left-over units are filled
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.augmentation import Augmentation
from pipeline.philox import Domain, UInt64Array, below, draw, ratio, unit

_ATTEMPTS = 40
_ATTEMPTS_AT_ONCE = 10
_FILL_BLOCK = 64


def block_masks(
    uids: npt.ArrayLike, *, epoch: int, seed: int, augmentation: Augmentation
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Mask exactly one global crop of each image.

    Args:
        uids: sample ids, uint64 [b].
        epoch: draws the masks anew each epoch.
        seed: 64-bit seed.
        augmentation: grid, ratio and block limits; g global crops of n patches.

    Returns:
        masks, bool [g*b, n], crop-major; and the flat indices of the masked patches into [g*b*n], ascending,
        int64 [b * augmentation.num_masked_patches].
    """
    a = augmentation
    ids = np.asarray(uids, np.uint64)
    b, g = len(ids), a.num_global_crops
    if a.num_masked_units == 0:
        return np.zeros((g * b, a.num_patches), bool), np.empty(0, np.int64)
    crop = below(draw(ids, 0, 0, seed=seed, domain=Domain.MASK, index=epoch)[:, 0], g)
    units = unit_masks(ids, crop, epoch=epoch, seed=seed, augmentation=a)
    factor = a.mask_patch_size // a.patch_size
    patches = units.repeat(factor, 1).repeat(factor, 2)
    by_crop = np.zeros((g, b, a.num_patches), bool)
    by_crop[crop, np.arange(b)] = patches.reshape(b, -1)
    masks = by_crop.reshape(g * b, -1)
    return masks, np.flatnonzero(masks)


def unit_masks(
    uids: UInt64Array, crops: npt.NDArray[np.int64], *, epoch: int, seed: int, augmentation: Augmentation
) -> npt.NDArray[np.bool_]:
    """Mask `augmentation.num_masked_units` units of one crop of each image, bool [b, side, side]."""
    a = augmentation
    side = a.global_crops_size // a.mask_patch_size
    mask = np.zeros((len(uids), side, side), bool)
    left = np.full(len(uids), a.num_masked_units)
    for first in range(0, _ATTEMPTS, _ATTEMPTS_AT_ONCE):
        active = np.flatnonzero(left)
        if not len(active):
            return mask
        numbers = 1 + np.arange(first, first + _ATTEMPTS_AT_ONCE)
        words = draw(uids[active, None], crops[active, None], numbers, seed=seed, domain=Domain.MASK, index=epoch)
        part, part_left = mask[active], left[active]
        for attempt in range(_ATTEMPTS_AT_ONCE):
            _add_block(part, part_left, words[:, attempt], a)
        mask[active], left[active] = part, part_left
    unfinished = np.flatnonzero(left)
    if len(unfinished):
        numbers = _FILL_BLOCK + np.arange(-(-side * side // 4))
        words = draw(
            uids[unfinished, None],
            crops[unfinished, None],
            numbers,
            seed=seed,
            domain=Domain.MASK,
            index=epoch,
        )
        mask[unfinished] = _filled(mask[unfinished], left[unfinished], words)
    return mask


def draw_blocks(words: UInt64Array, left: npt.NDArray[np.int64], augmentation: Augmentation) -> npt.NDArray[np.int64]:
    """Draw one block an image: top, left, height, width in units, int64 [b, 4]; zeros where it does not fit.

    Args:
        words: area, ratio, top, left, uint64 [b, 4].
        left: units still to be masked, [b].
        augmentation: grid and block limits.
    """
    a = augmentation
    side = a.global_crops_size // a.mask_patch_size
    least = np.minimum(a.mask_min_units, left)
    area = least + (left - least) * unit(words[:, 0])
    aspect = ratio(words[:, 1], *a.mask_aspect_ratio)
    height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    fits = (height > 0) & (width > 0) & (height < side) & (width < side)
    top = below(words[:, 2], np.where(fits, side - height + 1, 1))
    start = below(words[:, 3], np.where(fits, side - width + 1, 1))
    return np.stack([top, start, height, width], -1) * fits[:, None]


def _add_block(mask: npt.NDArray[np.bool_], left: npt.NDArray[np.int64], words: UInt64Array, a: Augmentation) -> None:
    """Add one block to each mask where it adds from 1 to `left` units; both are changed in place."""
    block = draw_blocks(words, left, a)
    place = np.arange(mask.shape[1])
    rows = (place >= block[:, 0, None]) & (place < block[:, :1] + block[:, 2:3])
    columns = (place >= block[:, 1, None]) & (place < block[:, 1:2] + block[:, 3:4])
    new = rows[:, :, None] & columns[:, None, :] & ~mask
    added = np.count_nonzero(new, axis=(1, 2))
    keep = (added > 0) & (added <= left)
    mask |= new & keep[:, None, None]
    left -= np.where(keep, added, 0)


def _filled(mask: npt.NDArray[np.bool_], left: npt.NDArray[np.int64], words: UInt64Array) -> npt.NDArray[np.bool_]:
    """Mask `left` more units of each image, in the order of their words."""
    b, side, _ = mask.shape
    taken = mask.reshape(b, -1)
    keys = np.where(taken, np.uint64(1) << np.uint64(40), words.reshape(b, -1)[:, : side * side])
    place = np.argsort(np.argsort(keys, -1, kind="stable"), -1, kind="stable")
    return (taken | (place < left[:, None])).reshape(mask.shape)
