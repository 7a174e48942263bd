"""iBOT masks: exact counts, BEiT's block limits, purity."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.augmentation import Augmentation
from pipeline.masks import block_masks, draw_blocks, unit_masks
from pipeline.philox import Domain, draw

FINE = Augmentation(mask_patch_size=16)
# A resumed run must draw the masks that the run before would have drawn.
GOLDEN_MASKS = [
    "4a331d7ad53403fd7dd61364d524777c88d6fde30fc3fbc7d944fc2210a590a0",
    "2434c08e78f28ec1321a36418b1cb25637e86677aa1bf86f426cfe75f61c0a7e",
]


def _uids(n):
    return np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


@given(
    ratio=st.floats(0.0, 1.0), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10**6),
    grid=st.sampled_from([(224, 16, 32), (224, 16, 16), (48, 8, 8), (48, 8, 16), (64, 8, 64)]),
    crops=st.integers(1, 3),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_exactly_one_crop_of_an_image_is_masked_with_the_exact_count(ratio, seed, epoch, grid, crops):
    side, patch, unit = grid
    a = Augmentation(
        num_global_crops=crops, blur_prob_global=(0.0,) * crops, solarize_prob_global=(0.0,) * crops,
        global_crops_size=side, patch_size=patch, mask_patch_size=unit, mask_ratio=ratio,
    )  # fmt: skip
    masks, indices = block_masks(_uids(9), epoch=epoch, seed=seed, augmentation=a)
    count = round(ratio * (side // unit) ** 2) * (unit // patch) ** 2
    per_crop = np.sort(masks.reshape(crops, 9, -1).sum(-1), axis=0)
    assert (per_crop[:-1] == 0).all()
    assert (per_crop[-1] == count).all()
    assert np.array_equal(indices, np.flatnonzero(masks))
    assert len(indices) == 9 * count == 9 * a.num_masked_patches


def test_a_mask_patch_of_32_pixels_is_two_by_two_patches():
    masks, _ = block_masks(_uids(50), epoch=0, seed=1, augmentation=Augmentation())
    grid = masks.reshape(-1, 7, 2, 7, 2)
    assert masks.any()
    assert np.array_equal(grid.any((2, 4)), grid.all((2, 4)))


def test_blocks_obey_beits_limits():
    a = FINE
    words = draw(_uids(5000), 0, 1, seed=2, domain=Domain.MASK, index=0)
    for left in (78, 20, 3):
        block = draw_blocks(words, np.full(5000, left), a)
        fits = block[:, 2] > 0
        top, start, height, width = block[fits].T
        assert fits.mean() > 0.5
        assert (height < 14).all()
        assert (width < 14).all()
        assert ((top >= 0) & (top + height <= 14) & (start >= 0) & (start + width <= 14)).all()
        # Each side is rounded by at most half a unit, so the area is off by half the circumference at most.
        slack = (height + width) / 2 + 0.25
        assert (height * width >= min(a.mask_min_units, left) - slack).all()
        assert (height * width <= left + slack).all()
        low, high = a.mask_aspect_ratio
        assert ((width + 0.5) / (height - 0.5) >= low).all()
        assert ((width - 0.5) / (height + 0.5) <= high).all()


def _reference_masks(a, n):
    """BEiT's generator as its paper's algorithm says it, one block after the other, bool [n, side, side]."""
    rng = np.random.default_rng(0)
    side, total = a.global_crops_size // a.mask_patch_size, a.num_masked_units
    masks = np.zeros((n, side, side), bool)
    for mask in masks:
        for _ in range(40):
            left = total - mask.sum()
            if left == 0:
                break
            area = rng.uniform(min(a.mask_min_units, left), left)
            aspect = np.exp(rng.uniform(*np.log(a.mask_aspect_ratio)))
            h, w = round(np.sqrt(area / aspect)), round(np.sqrt(area * aspect))
            if not (0 < h < side and 0 < w < side):
                continue
            top, start = rng.integers(0, side - h + 1), rng.integers(0, side - w + 1)
            block = np.zeros_like(mask)
            block[top : top + h, start : start + w] = True
            if 0 < (block & ~mask).sum() <= left:
                mask |= block
        free = np.flatnonzero(~mask.reshape(-1))
        mask.reshape(-1)[rng.permutation(free)[: total - mask.sum()]] = True
    return masks


def _neighbour_share(mask):
    both = (mask[:, 1:] & mask[:, :-1]).sum((1, 2)) + (mask[:, :, 1:] & mask[:, :, :-1]).sum((1, 2))
    return both / (mask[:, 1:].sum((1, 2)) + mask[:, :, 1:].sum((1, 2)))


@pytest.mark.parametrize("a", [FINE, Augmentation()])
def test_masks_are_blocks_with_the_statistics_of_beits_generator(a):
    n = 1500
    ours = unit_masks(_uids(n), np.zeros(n, np.int64), epoch=0, seed=3, augmentation=a)
    theirs = _reference_masks(a, n)
    # Five standard errors of the difference of two means.
    shares = _neighbour_share(ours), _neighbour_share(theirs)
    error = np.sqrt((shares[0].var() + shares[1].var()) / n)
    assert abs(shares[0].mean() - shares[1].mean()) < 5 * error
    assert shares[0].mean() > 0.5  # scattered units would give the ratio, 0.4
    assert np.allclose(ours.mean(0), theirs.mean(0), atol=5 * np.sqrt(0.25 * 2 / n))


def test_each_crop_is_masked_equally_often():
    n = 4000
    masks, _ = block_masks(_uids(n), epoch=4, seed=5, augmentation=Augmentation())
    share = masks.reshape(2, n, 196).any(-1).mean(1)
    assert share.sum() == 1
    assert abs(share[0] - 0.5) < 5 * 0.5 / np.sqrt(n)


def test_masks_are_pure_and_fresh_each_epoch():
    uids = _uids(32)
    masks, _ = block_masks(uids, epoch=1, seed=1, augmentation=FINE)
    again, _ = block_masks(uids, epoch=1, seed=1, augmentation=FINE)
    other, _ = block_masks(uids, epoch=2, seed=1, augmentation=FINE)
    assert np.array_equal(masks, again)
    assert not np.array_equal(masks, other)
    order = np.random.default_rng(0).permutation(32)
    shuffled, _ = block_masks(uids[order], epoch=1, seed=1, augmentation=FINE)
    assert np.array_equal(masks.reshape(2, 32, -1)[:, order], shuffled.reshape(2, 32, -1))
    single, _ = block_masks(uids[5:6], epoch=1, seed=1, augmentation=FINE)
    assert np.array_equal(masks.reshape(2, 32, -1)[:, 5], single)


def test_masks_never_change():
    _, coarse = block_masks(_uids(200), epoch=7, seed=12345, augmentation=Augmentation())
    _, fine = block_masks(_uids(200), epoch=7, seed=12345, augmentation=FINE)
    found = [hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest() for indices in (coarse, fine)]
    assert found == GOLDEN_MASKS


def test_ratio_zero_masks_nothing():
    masks, indices = block_masks(_uids(3), epoch=0, seed=0, augmentation=replace(FINE, mask_ratio=0.0))
    assert masks.shape == (6, 196)
    assert not masks.any()
    assert len(indices) == 0
    assert indices.dtype == np.int64
