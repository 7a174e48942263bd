"""Presets, validation and fingerprints of the augmentation."""

from dataclasses import fields, replace

import pytest

from common.errors import UserError
from pipeline.augmentation import Augmentation, named_augmentation


def test_preset_dino_has_the_defaults_of_the_dino_code():
    a = named_augmentation("dino")
    assert (a.global_crops_scale, a.local_crops_scale) == ((0.4, 1.0), (0.05, 0.4))
    assert (a.num_global_crops, a.num_local_crops, a.global_crops_size, a.local_crops_size) == (2, 8, 224, 96)
    assert (a.brightness, a.contrast, a.saturation, a.hue, a.jitter_prob) == (0.4, 0.4, 0.2, 0.1, 0.8)
    assert (a.blur_prob_global, a.blur_prob_local, a.solarize_prob_global) == ((1.0, 0.1), 0.5, (0.0, 0.2))


def test_preset_dinov2_released_blurs_with_the_released_probabilities():
    a = named_augmentation("dinov2_released")
    assert (a.blur_prob_global, a.blur_prob_local) == ((0.0, 0.9), 0.5)
    assert (a.global_crops_scale, a.local_crops_scale) == ((0.32, 1.0), (0.05, 0.32))


def test_unknown_preset_offers_the_closest_name():
    with pytest.raises(UserError, match=r"'dinov2_release' is unknown. Did you mean 'dinov2_released'\?"):
        named_augmentation("dinov2_release")


def test_masked_patches_are_whole_units():
    a = Augmentation()
    assert (a.num_patches, a.num_mask_units) == (196, 49)
    assert a.num_masked_units == 20  # round(0.4 * 49)
    assert a.num_masked_patches == 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_global_crops": 0}, "num_global_crops is 0"),
        ({"num_local_crops": -1}, "num_local_crops is -1"),
        ({"global_crops_size": 220}, "global_crops_size is 220. It must be a multiple of patch_size 16"),
        ({"local_crops_size": 4}, "local_crops_size is 4"),
        ({"local_crops_size": 100}, "local_crops_size is 100. It must be a multiple of patch_size"),
        ({"mask_patch_size": 24}, "mask_patch_size is 24. It must be a multiple"),
        ({"mask_patch_size": 64}, "mask_patch_size is 64. It must be a divisor"),
        ({"global_crops_scale": (0.5, 0.4)}, "global_crops_scale"),
        ({"aspect_ratio": (0.0, 1.0)}, "aspect_ratio"),
        ({"flip_prob": 1.5}, "flip_prob is 1.5"),
        ({"hue": 0.6}, "hue is 0.6"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        ({"blur_prob_global": (1.0,)}, "blur_prob_global"),
        ({"solarize_prob_global": (0.0, 1.1)}, "solarize_prob_global"),
    ],
)
def test_a_field_out_of_range_is_named_with_its_value(change, message):
    with pytest.raises(UserError, match=message):
        replace(Augmentation(), **change)


def test_mask_sizes_are_free_where_nothing_is_masked():
    assert Augmentation(mask_ratio=0.0, mask_patch_size=20).num_masked_units == 0


def test_fingerprint_changes_with_every_field():
    base = Augmentation()
    changes = {
        "num_global_crops": {"num_global_crops": 1,
                             "blur_prob_global": (1.0,), "solarize_prob_global": (0.0,)},
        "num_local_crops": 6, "global_crops_size": 256, "local_crops_size": 112,
        "global_crops_scale": (0.3, 1.0), "local_crops_scale": (0.05, 0.3), "aspect_ratio": (0.8, 1.25),
        "flip_prob": 0.0, "jitter_prob": 0.7, "brightness": 0.3, "contrast": 0.3, "saturation": 0.1,
        "hue": 0.0, "gray_prob": 0.1, "blur_prob_global": (0.5, 0.5), "blur_prob_local": 0.4,
        "blur_sigma": (0.1, 1.0),
        "solarize_prob_global": (0.1, 0.1), "patch_size": 8, "mask_patch_size": 16, "mask_ratio": 0.3,
        "mask_min_units": 2, "mask_aspect_ratio": (0.5, 2.0), "teacher_photometric": True,
    }  # fmt: skip
    assert set(changes) == {f.name for f in fields(Augmentation)}
    prints = {base.fingerprint()}
    for name, value in changes.items():
        prints.add(replace(base, **(value if isinstance(value, dict) else {name: value})).fingerprint())
    assert len(prints) == len(changes) + 1


def test_geometry_fingerprint_ignores_what_the_teacher_does_not_see():
    base = Augmentation()
    other = replace(base, num_local_crops=2, local_crops_scale=(0.1, 0.2), brightness=0.0, mask_ratio=0.2)
    assert base.geometry_fingerprint() == other.geometry_fingerprint()
    assert base.geometry_fingerprint() != replace(base, flip_prob=0.1).geometry_fingerprint()
    assert base.geometry_fingerprint() != replace(base, aspect_ratio=(0.8, 1.2)).geometry_fingerprint()


def test_geometry_fingerprint_holds_photometrics_where_the_teacher_sees_them():
    base = Augmentation(teacher_photometric=True)
    assert base.geometry_fingerprint() != replace(base, brightness=0.0).geometry_fingerprint()
    assert base.geometry_fingerprint() == replace(base, blur_prob_local=0.0).geometry_fingerprint()
