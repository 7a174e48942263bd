"""The crop plan: golden boxes, ranges, independence of the draws."""

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from pipeline.augmentation import Augmentation, named_augmentation
from pipeline.plan import (
    PLAN_VERSION,
    box_test_vector,
    center_crop_plan,
    crop_plan,
    global_crops_spec,
    undistorted,
)

GOLDEN_VERSION = 1
GOLDEN_BOXES = {
    ("dino", 0): "39946c1b3efd3059d4e74fc348721caf15417e038544b4e6b5def83eb43a5a35",
    ("dino", 3): "2d521bbc35d35a56f44a445b6f2de7f9279d63836ac76b270864a2ce54816ced",
    ("dinov2_released", 0): "a57a7850aa8d5f7f82d07c955d75d29b756017f4abdf925378cc10ffb826f412",
}
GOLDEN_SEED = 12345
# Of all ten views: boxes, flips, blur and solarize; and colours. Without and with `teacher_photometric`.
GOLDEN_PLAN = (
    "8b6c74ad316d27a3585682fc5d2d659f2d88565eb119c3249e6916d7acf38960",
    "453e533c7742aafeab9d11183e054837c1351e583e0afa325604f534def7e43a",
)
GOLDEN_COLOURS = (
    "08c9bd6425a1384baca2a85892370d191b77182d3e05be497aa87c3b3e8b8ad3",
    "7222f77d7cc7de4fcdffe1c79159d9e3370fe3f0fdc02e3e53b5ea755355dc04",
)
MANY = 20_000


def _plan(n=64, *, view_set=0, epoch=0, seed=1, size=(375, 500), augmentation=None, uids=None):
    uids = np.arange(n, dtype=np.uint64) if uids is None else uids
    sizes = np.tile(np.array(size), (len(uids), 1))
    return crop_plan(
        uids, sizes, view_set=view_set, epoch=epoch, seed=seed, augmentation=augmentation or named_augmentation("dino")
    )


@pytest.mark.parametrize(("name", "view_set"), GOLDEN_BOXES)
def test_global_boxes_of_a_thousand_ids_never_change(name, view_set):
    assert PLAN_VERSION == GOLDEN_VERSION
    assert box_test_vector(GOLDEN_SEED, named_augmentation(name), view_set) == GOLDEN_BOXES[name, view_set]


def _digest(*arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _thousand(**changes):
    uids = np.arange(1, 1001, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)
    sizes = np.stack([1 + uids % np.uint64(1999), 1 + (uids >> np.uint64(32)) % np.uint64(1999)], -1)
    arguments = {"view_set": 2, "epoch": 7, "seed": GOLDEN_SEED, "augmentation": named_augmentation("dino")}
    return crop_plan(uids, sizes, **(arguments | changes))


@pytest.mark.parametrize("photometric", [False, True])
def test_no_bit_of_the_whole_plan_of_a_thousand_ids_ever_changes(photometric):
    plan = _thousand(augmentation=replace(named_augmentation("dino"), teacher_photometric=photometric))
    assert _digest(plan.boxes, plan.flips, plan.blur_sigma, plan.solarize) == GOLDEN_PLAN[photometric]
    # Colours alone pass through sine and cosine, whose last bit is the machine's: a grid above float32's rounding.
    assert _digest(np.rint(plan.colour.astype(np.float64) * 2**16).astype(np.int64)) == GOLDEN_COLOURS[photometric]


def test_the_golden_plan_sees_one_bit_of_any_part():
    plan = _thousand()
    parts = [plan.boxes, plan.flips, plan.blur_sigma, plan.solarize]
    for i, part in enumerate(parts):
        changed = part.copy()
        changed.reshape(-1).view(np.uint8)[-1] ^= 1
        assert _digest(*parts[:i], changed, *parts[i + 1 :]) != GOLDEN_PLAN[False]


def test_golden_boxes_change_with_seed_view_set_and_geometry():
    base = named_augmentation("dino")
    variants = [
        box_test_vector(1, base), box_test_vector(2, base), box_test_vector(1, base, 1),
        box_test_vector(1, replace(base, flip_prob=0.4)),
        box_test_vector(1, replace(base, aspect_ratio=(0.7, 1.4))),
    ]  # fmt: skip
    assert len(set(variants)) == len(variants)
    assert box_test_vector(1, replace(base, num_local_crops=0, hue=0.0)) == variants[0]


@given(
    height=st.integers(1, 3000), width=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1),
    low=st.floats(0.01, 1.0), ratio=st.floats(0.1, 1.0),
)  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_every_box_lies_inside_its_image(height, width, seed, low, ratio):
    a = Augmentation(global_crops_scale=(low, 1.0), local_crops_scale=(low / 2, low), aspect_ratio=(ratio, 1 / ratio))
    boxes = _plan(16, seed=seed, size=(height, width), augmentation=a).boxes
    top, left, h, w = np.moveaxis(boxes, -1, 0)
    assert boxes.shape == (16, 10, 4)
    assert top.min() >= 0
    assert left.min() >= 0
    assert h.min() >= 1
    assert w.min() >= 1
    assert (top + h).max() <= height
    assert (left + w).max() <= width


@pytest.mark.parametrize("low_high", [(0.05, 0.06), (20.0, 21.0)])
def test_an_image_without_a_fitting_box_gets_a_central_crop_of_at_least_a_pixel(low_high):
    a = Augmentation(aspect_ratio=low_high, num_local_crops=0)
    for size in [(1, 1), (1, 7), (7, 1)]:
        top, left, h, w = _plan(1, size=size, augmentation=a).boxes[0, 0].tolist()
        assert (h, w) == (1, 1) or (h, w) == size
        assert (top, left) == ((size[0] - h) // 2, (size[1] - w) // 2)


def test_box_areas_and_ratios_fill_their_stated_ranges():
    plan = _plan(MANY, size=(1000, 1000))
    h, w = plan.boxes[..., 2].astype(float), plan.boxes[..., 3].astype(float)
    area, ratio = h * w / 1e6, w / h
    # A side is rounded to a pixel: half a pixel of the shortest side is the relative error of a ratio.
    slack = 0.5 / 190
    for views, (low, high) in [(slice(0, 2), (0.4, 1.0)), (slice(2, 10), (0.05, 0.4))]:
        assert area[:, views].min() >= low * (1 - 2 * slack)
        assert area[:, views].max() <= high * (1 + 2 * slack)
        assert ratio[:, views].min() >= 0.75 * (1 - 2 * slack)
        assert ratio[:, views].max() <= 4 / 3 * (1 + 2 * slack)
    # Local boxes always fit a square image, so their area is uniform and their log ratio is too.
    n = h[:, 2:].size
    spread = (0.4 - 0.05) / math.sqrt(12 * n)
    assert abs(area[:, 2:].mean() - 0.225) < 5 * spread
    assert abs(np.log(ratio[:, 2:]).mean()) < 5 * math.log(16 / 9) / math.sqrt(12 * n) + slack / 10
    edges = np.quantile(area[:, 2:], [0.25, 0.5, 0.75])
    assert np.allclose(edges, 0.05 + 0.35 * np.array([0.25, 0.5, 0.75]), atol=5 * 0.35 * 0.5 / math.sqrt(n) + 1e-3)


def test_positions_are_uniform_over_what_is_free():
    plan = _plan(MANY, size=(400, 600))
    top, left, h, w = np.moveaxis(plan.boxes[:, 2:].astype(float), -1, 0)
    for start, side, box in [(top, 400, h), (left, 600, w)]:
        place = (start + 0.5) / (side - box + 1)
        assert abs(place.mean() - 0.5) < 5 / math.sqrt(12 * place.size)
        assert abs(place.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / place.size) + 1e-4


def test_probabilities_of_flip_blur_and_solarize_are_the_stated_ones():
    plan = _plan(MANY)
    tolerance = 5 * 0.5 / math.sqrt(MANY)
    assert np.allclose(plan.flips.mean(0), 0.5, atol=tolerance)
    blur = (plan.blur_sigma > 0).mean(0)
    assert np.allclose(blur, [1.0, 0.1] + [0.5] * 8, atol=tolerance)
    assert np.allclose(plan.solarize.mean(0), [0.0, 0.2] + [0.0] * 8, atol=tolerance)
    drawn = plan.blur_sigma[:, 0]
    assert drawn.min() >= 0.1
    assert drawn.max() <= 2.0
    assert abs(drawn.mean() - 1.05) < 5 * 1.9 / math.sqrt(12 * MANY)


def test_colour_keeps_gray_gray_and_scales_by_brightness_and_contrast():
    colour = _plan(2000).colour.astype(np.float64)
    out = colour[..., :3] @ np.full(3, 127.5) + colour[..., 3]
    # Float32 coefficients of order one, times 127.5.
    assert np.ptp(out, axis=-1).max() < 1e-4
    gain = colour[..., :3].sum(-1)[..., 0]
    offset = colour[..., 0, 3]
    contrast = 1 - offset / 127.5
    brightness = gain / contrast
    assert 0.6 - 1e-5 <= contrast.min() < contrast.max() <= 1.4 + 1e-5
    assert 0.6 - 1e-5 <= brightness.min() < brightness.max() <= 1.4 + 1e-5
    untouched = (np.abs(colour[..., :3] - np.eye(3)).max((-1, -2)) < 1e-6) & (np.abs(offset) < 1e-6)
    # Neither jittered (0.2) nor gray (0.8).
    assert abs(untouched.mean() - 0.16) < 5 * math.sqrt(0.16 * 0.84 / untouched.size)


def test_gray_crops_are_luma():
    colour = _plan(8, augmentation=Augmentation(gray_prob=1.0, jitter_prob=0.0)).colour
    assert np.allclose(colour[..., :3], np.tile([0.299, 0.587, 0.114], (3, 1)), atol=1e-3)


def test_hue_turns_chroma_and_keeps_luma():
    a = Augmentation(gray_prob=0.0, jitter_prob=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.25)
    colour = _plan(500, augmentation=a).colour[..., :3].astype(np.float64)
    luma = np.array([0.299, 0.587, 0.114])
    assert np.allclose(luma @ colour, luma, atol=1e-5)
    assert np.abs(colour - np.eye(3)).max() > 0.5
    assert np.allclose(np.linalg.det(colour), 1.0, atol=1e-4)


def test_global_geometry_depends_on_the_view_set_and_everything_else_on_the_epoch():
    base, other_epoch, other_set = _plan(), _plan(epoch=1), _plan(view_set=1)
    assert np.array_equal(base.boxes[:, :2], other_epoch.boxes[:, :2])
    assert np.array_equal(base.flips[:, :2], other_epoch.flips[:, :2])
    assert not np.array_equal(base.boxes[:, 2:], other_epoch.boxes[:, 2:])
    assert not np.array_equal(base.colour[:, :2], other_epoch.colour[:, :2])
    assert not np.array_equal(base.blur_sigma[:, :1], other_epoch.blur_sigma[:, :1])
    assert not np.array_equal(base.boxes[:, :2], other_set.boxes[:, :2])
    assert np.array_equal(base.boxes[:, 2:], other_set.boxes[:, 2:])
    assert np.array_equal(base.colour, other_set.colour)


def test_with_teacher_photometric_the_global_photometrics_are_fixed_by_the_view_set():
    a = Augmentation(teacher_photometric=True)
    base, other_epoch, other_set = (_plan(epoch=e, view_set=s, augmentation=a) for e, s in [(0, 0), (1, 0), (0, 1)])
    for name in ("colour", "blur_sigma", "solarize"):
        assert np.array_equal(getattr(base, name)[:, :2], getattr(other_epoch, name)[:, :2])
    assert not np.array_equal(base.colour[:, :2], other_set.colour[:, :2])
    assert not np.array_equal(base.colour[:, 2:], other_epoch.colour[:, 2:])


def test_global_boxes_do_not_depend_on_local_crops_photometrics_or_masks():
    base = _plan()
    other = _plan(augmentation=Augmentation(num_local_crops=0, brightness=0.0, mask_ratio=0.0, gray_prob=1.0))
    assert np.array_equal(base.boxes[:, :2], other.boxes)
    assert np.array_equal(base.flips[:, :2], other.flips)


@given(st.permutations(range(12)))
@settings(deadline=None, max_examples=20)
def test_a_sample_has_the_same_plan_in_any_batch_and_order(order):
    uids = (np.arange(12, dtype=np.uint64) + np.uint64(7)) << np.uint64(33)
    whole, shuffled = _plan(uids=uids), _plan(uids=uids[list(order)])
    single = _plan(uids=uids[order[0] : order[0] + 1])
    for name in ("boxes", "flips", "colour", "blur_sigma", "solarize"):
        assert np.array_equal(getattr(whole, name)[list(order)], getattr(shuffled, name))
        assert np.array_equal(getattr(shuffled, name)[:1], getattr(single, name))


def test_ids_that_share_a_half_word_have_different_plans():
    uids = np.array([1, 1 + 2**32, 2**32], np.uint64)
    boxes = _plan(uids=uids).boxes.reshape(3, -1)
    assert len(np.unique(boxes, axis=0)) == 3


def test_spec_holds_box_flip_and_image_size():
    plan = _plan(2, size=(40000, 65535))
    spec = global_crops_spec(plan, [[40000, 65535]] * 2, 2)
    assert np.array_equal(spec[..., :4], plan.boxes[:, :2])
    assert np.array_equal(spec[..., 4], plan.flips[:, :2])
    assert (spec[..., 5].view(np.uint32) == (40000 << 16 | 65535)).all()


def test_centre_crop_is_the_centred_square():
    plan = center_crop_plan([[200, 300], [301, 200], [1, 1]], crop_ratio=0.875)
    assert plan.boxes[:, 0].tolist() == [[12, 62, 175, 175], [63, 12, 175, 175], [0, 0, 1, 1]]
    assert not plan.flips.any()
    assert np.array_equal(plan.colour[0, 0], np.eye(3, 4))
    assert not plan.blur_sigma.any()
    assert not plan.solarize.any()


def test_undistorted_keeps_geometry_only():
    plan = _plan()
    clean = undistorted(plan)
    assert np.array_equal(clean.boxes, plan.boxes)
    assert np.array_equal(clean.flips, plan.flips)
    assert np.array_equal(clean.colour, np.broadcast_to(np.eye(3, 4), (64, 10, 3, 4)))
    assert not clean.blur_sigma.any()
    assert not clean.solarize.any()


@pytest.mark.parametrize(
    ("uids", "sizes", "message"),
    [
        ([1, 2], [[10, 10]], "Pass uids"),
        ([1], [[0, 10]], "an image of 0 x 10 pixels"),
        ([1], [[10, 70000]], "an image of 10 x 70000 pixels"),
    ],
)
def test_impossible_sizes_are_refused(uids, sizes, message):
    with pytest.raises(UserError, match=message):
        crop_plan(uids, sizes, view_set=0, epoch=0, seed=0, augmentation=named_augmentation("dino"))


def test_centre_crop_ratio_out_of_range_is_refused():
    with pytest.raises(UserError, match=r"crop_ratio is 1\.5"):
        center_crop_plan([[10, 10]], crop_ratio=1.5)
