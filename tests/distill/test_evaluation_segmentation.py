"""Segmentation from patch tokens: layouts, labels, mean IoU, and what is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from distill.evaluation.features import FeatureModel
from distill.evaluation.segmentation import (
    IGNORED,
    MaskedImages,
    _drawn_labels,
    find_masked_images,
    mean_iou,
    read_masked,
    segmentation_miou,
)
from distill.models import create_backbone
from pipeline.batch import normalise

COLOURS = np.array([[20, 20, 20], [230, 60, 60], [60, 60, 230]], dtype=np.uint8)
SIZE = 32


def pair(image: Path, mask: Path, classes: np.ndarray) -> None:  # type: ignore[type-arg]
    """Write a mask and an image that has a colour for each class."""
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(COLOURS[classes]).save(image)
    Image.fromarray(classes.astype(np.uint8)).save(mask)


def halves(seed: int, height: int = 40, width: int = 48) -> np.ndarray:  # type: ignore[type-arg]
    """Ground on one side of a line, one of two classes on the other; patches of the centre crop are pure."""
    rng = np.random.default_rng(seed)
    classes = np.zeros((height, width), dtype=np.int64)
    classes[:, 4 + 10 * rng.integers(1, 4) :] = rng.integers(1, 3)
    return classes


def masks_beside_images(root: Path) -> None:
    for split, number in (("train", 24), ("val", 6)):
        for i in range(number):
            name = f"{split}/group_{i % 2}/{i:03d}"
            pair(root / f"images/{name}.png", root / f"masks/{name}.png", halves(100 * number + i))


def ade20k(root: Path) -> None:
    for split in ("training", "validation"):
        for i in range(3):
            name = f"{split}/ADE_{i:08d}"
            pair(root / f"images/{name}.jpg", root / f"annotations/{name}.png", halves(i))


def voc(root: Path) -> None:
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for split, numbers in (("train", range(3)), ("val", range(3, 5))):
        for i in numbers:
            pair(root / f"JPEGImages/2007_{i}.jpg", root / f"SegmentationClass/2007_{i}.png", halves(i))
        listed = "".join(f"2007_{i}\n" for i in numbers)
        (root / f"ImageSets/Segmentation/{split}.txt").write_text(listed)


@pytest.mark.parametrize(
    ("write", "train", "val", "zero_ignored"),
    [(masks_beside_images, 24, 6, False), (ade20k, 3, 3, True), (voc, 3, 2, False)],
)
def test_each_layout_is_found_with_its_pairs(
    tmp_path: Path, write: Callable[[Path], None], train: int, val: int, zero_ignored: bool
) -> None:
    write(tmp_path)
    found = find_masked_images(tmp_path)
    assert (len(found.train), len(found.val), found.zero_ignored) == (train, val, zero_ignored)
    for image, mask in (*found.train, *found.val):
        assert image.stem == mask.stem
    _, labels = next(read_masked(found.train, size=SIZE, zero_ignored=zero_ignored))
    expected = {IGNORED, 0, 1} if zero_ignored else {0, 1, 2}
    assert set(labels.unique().tolist()) <= expected
    assert (IGNORED in labels.unique()) == zero_ignored


def test_a_model_that_sees_colour_segments_colour_and_ignored_pixels_do_not_count(tmp_path: Path) -> None:
    masks_beside_images(tmp_path)
    torch.manual_seed(0)
    model = create_backbone("vit_small", patch_size=8, model_args={"embed_dim": 32, "depth": 1, "num_heads": 1}).eval()
    blind = create_backbone("vit_small", patch_size=8, model_args={"embed_dim": 32, "depth": 1, "num_heads": 1}).eval()
    torch.nn.init.zeros_(blind.patch_embed.proj.weight)  # type: ignore[union-attr,arg-type]
    small = copy.deepcopy(model)
    torch.nn.init.constant_(small.norm.weight, 1e-3)  # type: ignore[union-attr,arg-type]
    models = {"sees": model, "small numbers": small, "blind": blind}
    entries = {name: FeatureModel(each, normalise) for name, each in models.items()}
    data = find_masked_images(tmp_path)
    scores = segmentation_miou(entries, data, size=SIZE, seed=0, device=torch.device("cpu"))
    assert min(*scores["sees"].values(), *scores["small numbers"].values()) > 90
    assert max(scores["blind"].values()) < 50
    again = segmentation_miou(entries, data, size=SIZE, seed=0, device=torch.device("cpu"))
    assert again == scores
    for _, mask in data.val:  # val's second class is no longer judged
        classes = np.asarray(Image.open(mask)).copy()
        classes[classes == 2] = IGNORED
        Image.fromarray(classes).save(mask)
    without = segmentation_miou({"sees": entries["sees"]}, data, size=SIZE, seed=0, device=torch.device("cpu"))
    assert without["sees"]["linear"] > 90


def test_mean_iou_is_that_of_the_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    truth, predicted = (torch.randint(5, (1000,), generator=generator) for _ in range(2))
    confusion = torch.bincount(truth * 8 + predicted, minlength=64).unflatten(0, (8, 8))
    naive = []
    for c in range(5):
        a, b = set(np.flatnonzero(truth == c)), set(np.flatnonzero(predicted == c))
        naive.append(len(a & b) / len(a | b))
    assert mean_iou(confusion) == pytest.approx(100 * np.mean(naive))


def test_a_patchs_label_is_drawn_from_its_own_pixels_by_their_share() -> None:
    mask = torch.zeros(1, 16, 16, dtype=torch.long)
    mask[0, :8, :8] = 1  # the first patch whole
    mask[0, 8:, 8:10] = 2  # a quarter of the last
    draws = torch.cat([_drawn_labels(mask, 8, torch.Generator().manual_seed(i)) for i in range(400)])
    assert (draws[:, 0] == 1).all()
    assert (draws[:, 1:3] == 0).all()
    # 400 draws at 1/4: five standard deviations are 0.11.
    assert (draws[:, 3] == 2).double().mean().item() == pytest.approx(0.25, abs=0.11)


def missing_image(root: Path) -> None:
    masks_beside_images(root)
    (root / "images/val/group_0/000.png").unlink()


def colour_mask(root: Path) -> None:
    masks_beside_images(root)
    Image.fromarray(COLOURS[halves(0)]).save(root / "masks/train/group_0/000.png")


def smaller_mask(root: Path) -> None:
    masks_beside_images(root)
    Image.fromarray(halves(0)[:20].astype(np.uint8)).save(root / "masks/val/group_0/000.png")


def broken_image(root: Path) -> None:
    masks_beside_images(root)
    (root / "images/train/group_1/001.png").write_bytes(b"not an image")


def one_class(root: Path) -> None:
    masks_beside_images(root)
    for path in (root / "masks/train").rglob("*.png"):
        Image.fromarray(np.zeros((40, 48), dtype=np.uint8)).save(path)


def no_val(root: Path) -> None:
    masks_beside_images(root)
    (root / "masks/val").rename(root / "masks/test")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (missing_image, "000.png: no image"),
        (colour_mask, "train/group_0/000.png: a mask of mode RGB"),
        (smaller_mask, "val/group_0/000.png: a mask of mode L, (48, 20)"),
        (broken_image, "train/group_1/001.png: no readable image"),
        (one_class, "of two classes at least"),
        (no_val, "no folder val or validation"),
        (lambda root: (root / "photos").mkdir(), "no images with masks"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, spoil: Callable[[Path], None], told: str) -> None:
    spoil(tmp_path)
    model = create_backbone("vit_small", patch_size=8, model_args={"embed_dim": 32, "depth": 1, "num_heads": 1})

    def judge(data: MaskedImages) -> None:
        entries = {"model": FeatureModel(model, normalise)}
        segmentation_miou(entries, data, size=SIZE, seed=0, device=torch.device("cpu"))

    with pytest.raises(UserError, match=re.escape(told)):
        judge(find_masked_images(tmp_path))
