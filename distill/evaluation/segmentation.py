"""Dense quality of patch tokens: linear and k-NN segmentation of images with masks, by mean IoU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from common.errors import UserError
from common.files import json_sha256
from distill.evaluation.features import FeatureModel, extract_patch_tokens
from distill.evaluation.linear import standardisation, subset_rows
from distill.evaluation.logistic import fit_logistic
from distill.evaluation.measures import knn_votes
from distill.models import patch_side

IGNORED = 255
# Labelled patch tokens that a classifier is fitted to and that vote, at most, evenly over the images.
MAX_PATCHES = 200_000
NEIGHBOURS = 20
REGULARISATIONS = (1e-1, 1e-2, 1e-3, 1e-4)
_HELD_OUT_EVERY = 10
_BATCH = 16
_SPLITS = {"train": ("train", "training"), "val": ("val", "validation")}
_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPEG", ".JPG", ".webp")


@dataclass(frozen=True)
class MaskedImages:
    """Pairs of an image and its mask, a PNG of class numbers with the image's size.

    Attributes:
        root: folder of the data set.
        train, val: (image, mask) of each split, sorted.
        zero_ignored: whether 0 is "other", as in ADE20K; 255 always is.
    """

    root: Path
    train: Sequence[tuple[Path, Path]]
    val: Sequence[tuple[Path, Path]]
    zero_ignored: bool

    def sampled(self, limit: int | None, seed: int) -> MaskedImages:
        """Keep at most `limit` pairs of each split, a seeded sample."""
        train, val = (
            [pairs[i] for i in subset_rows(len(pairs), limit=limit, seed=seed)] for pairs in (self.train, self.val)
        )
        return MaskedImages(self.root, train, val, self.zero_ignored)

    def fingerprint(self) -> str:
        """Hash of the masks' names and sizes."""
        masks = [mask for pairs in (self.train, self.val) for _, mask in pairs]
        return json_sha256([[mask.relative_to(self.root).as_posix(), mask.stat().st_size] for mask in masks])


def find_masked_images(root: Path) -> MaskedImages:
    """Find images and masks in the layout of ADE20K, of Pascal VOC, or in `images/` and `masks/`.

    ADE20K: `images/{training,validation}`, `annotations/{training,validation}`, 0 is "other". VOC: `JPEGImages`,
    `SegmentationClass`, lists in `ImageSets/Segmentation`. Else `images/{train,val}` and `masks/{train,val}`, with
    subfolders or without.

    Raises:
        UserError: there is none of these, a split has no mask, or a mask no image.
    """
    if (root / "SegmentationClass").is_dir():
        found = [_listed(root, root / "ImageSets" / "Segmentation" / f"{split}.txt") for split in _SPLITS]
    else:
        masks = next((root / name for name in ("annotations", "masks") if (root / name).is_dir()), None)
        if masks is None or not (root / "images").is_dir():
            raise UserError(
                f"--segmentation {root}: no images with masks. Give a folder with images/ and annotations/ (ADE20K), "
                "JPEGImages/ and SegmentationClass/ (Pascal VOC), or images/ and masks/."
            )
        found = [_beside(root, masks, split) for split in _SPLITS]
    return MaskedImages(root, found[0], found[1], zero_ignored=(root / "annotations").is_dir())


def _listed(root: Path, names: Path) -> list[tuple[Path, Path]]:
    if not names.is_file():
        raise UserError(f"{names}: no such file, and --segmentation {root} looks like Pascal VOC. Give its whole tree.")
    stems = sorted(names.read_text().split())
    return [(root / "JPEGImages" / f"{stem}.jpg", root / "SegmentationClass" / f"{stem}.png") for stem in stems]


def _beside(root: Path, masks: Path, split: str) -> list[tuple[Path, Path]]:
    folder = next((name for name in _SPLITS[split] if (masks / name).is_dir()), None)
    if folder is None:
        raise UserError(f"{masks}: no folder {' or '.join(_SPLITS[split])}. --segmentation needs train and val masks.")
    images = {
        path.relative_to(root / "images").with_suffix(""): path
        for path in sorted((root / "images" / folder).rglob("*"))
        if path.suffix in _SUFFIXES
    }
    pairs = []
    for mask in sorted((masks / folder).rglob("*.png")):
        name = mask.relative_to(masks).with_suffix("")
        if name not in images:
            raise UserError(f"{mask}: no image {root / 'images' / name}.jpg belongs to it. Add it or remove the mask.")
        pairs.append((images[name], mask))
    if not pairs:
        raise UserError(f"{masks / folder}: no mask (*.png) in it. --segmentation needs train and val masks.")
    return pairs


def read_masked(
    pairs: Sequence[tuple[Path, Path]], *, size: int, zero_ignored: bool
) -> Iterator[tuple[UInt8[Tensor, "b h w 3"], Int64[Tensor, "b h w"]]]:
    """Read centred squares of images (cubic, antialiased) and masks (nearest) at `size` pixels, in batches.

    Raises:
        UserError: a file cannot be read, or a mask is no map of class numbers or of another size than its image.
    """
    for start in range(0, len(pairs), _BATCH):
        crops, masks = zip(*(_read_pair(*pair, size) for pair in pairs[start : start + _BATCH]), strict=True)
        labels = torch.from_numpy(np.stack(masks)).long()
        if zero_ignored:
            labels = torch.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)
        yield torch.from_numpy(np.stack(crops)), labels


def _read_pair(image_path: Path, mask_path: Path, size: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    path = image_path
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        path = mask_path
        with Image.open(path) as opened:
            mask = opened.copy()
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path}: no readable image ({error}). Remove the pair or get the file again.") from error
    if mask.mode not in ("P", "L", "1") or mask.size != image.size:
        raise UserError(
            f"{mask_path}: a mask of mode {mask.mode}, {mask.size} pixels for an image of {image.size}. It must be a "
            "PNG of 8-bit class numbers (mode L, P or 1) with the image's size."
        )
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    box = (left, top, left + side, top + side)
    crop = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(crop), np.asarray(mask.resize((size, size), Image.Resampling.NEAREST, box=box)).astype(np.uint8)


@dataclass
class _Model:
    """A model with its labelled patch tokens, its classifier, and the confusion of each protocol."""

    entry: FeatureModel
    tokens: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    confusion: dict[str, Tensor] = field(default_factory=dict)


def segmentation_miou(
    entries: Mapping[str, FeatureModel],
    data: MaskedImages,
    *,
    size: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    max_patches: int = MAX_PATCHES,
) -> dict[str, dict[str, float]]:
    """Mean IoU in percent on val, of a linear classifier on patch tokens and of their nearest neighbours.

    Each train patch is labelled by one of its pixels, drawn at random, so that on average its label is its share of
    each class. The classifier is a logistic regression, its strength chosen on every tenth train image. Scores of
    patches are enlarged to pixels (bilinear) before the best class is taken.

    Args:
        entries: models by name, on the device; each sees the same pixels.
        data: images and masks.
        size: side of the crop in pixels, a multiple of every model's patch.
        seed: of the drawn patches and pixels.
        device: where the models are.
        dtype: compute dtype of the forward passes.
        max_patches: train patches used, at most.

    Returns:
        For each model `linear` and `knn`.

    Raises:
        UserError: a file is bad (see `read_masked`), or the masks of train hold fewer than two classes.
    """
    models = {name: _Model(entry) for name, entry in entries.items()}
    generator = torch.Generator().manual_seed(seed)
    per_image = max(1, max_patches // len(data.train))
    for crops, masks in read_masked(data.train, size=size, zero_ignored=data.zero_ignored):
        for model in models.values():
            side = patch_side(model.entry.model)
            labels = _drawn_labels(masks, side, generator)  # [b, n]
            chosen = torch.rand(labels.shape, generator=generator).argsort(1)[:, :per_image]
            tokens = extract_patch_tokens(model.entry, crops.to(device), dtype=dtype)
            model.tokens.append(tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2])))
            model.labels.append(labels.gather(1, chosen))
    fitted = {name: _fit(model, data, device) for name, model in models.items()}
    for crops, masks in read_masked(data.val, size=size, zero_ignored=data.zero_ignored):
        for name, model in models.items():
            weight, bias, bank, bank_labels = fitted[name]
            tokens = extract_patch_tokens(model.entry, crops.to(device), dtype=dtype).to(device)
            flat = tokens.flatten(0, 1)
            votes = [block[NEIGHBOURS] for block in knn_votes(bank, bank_labels, flat, k=[NEIGHBOURS])]
            shares = F.normalize(torch.cat(votes), p=1, dim=1)
            scores = {"linear": flat @ weight.T + bias, "knn": shares}
            for protocol, score in scores.items():
                predicted = _to_pixels(score.unflatten(0, tokens.shape[:2]), size).cpu()
                confusion = _confusion(predicted, masks)
                model.confusion[protocol] = model.confusion.get(protocol, torch.zeros_like(confusion)) + confusion
    return {
        name: {protocol: mean_iou(confusion) for protocol, confusion in model.confusion.items()}
        for name, model in models.items()
    }


def mean_iou(confusion: Int64[Tensor, "c c"]) -> float:
    """Mean over the classes that are there, or were predicted, of intersection over union, in percent."""
    hits = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - hits
    return 100 * (hits / union)[union > 0].mean().item()


def _drawn_labels(masks: Int64[Tensor, "b h w"], side: int, generator: torch.Generator) -> Int64[Tensor, "b n"]:
    """Return the class of one random pixel of each patch."""
    patches = F.unfold(masks[:, None].float(), side, stride=side).mT.long()  # [b, n, side * side]
    return patches.gather(2, torch.randint(side**2, (*patches.shape[:2], 1), generator=generator))[..., 0]


def _fit(model: _Model, data: MaskedImages, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weight and bias of the classifier with the best strength, and the tokens that vote with their labels."""
    labels = torch.cat(model.labels)  # [images, n]
    held = torch.zeros_like(labels, dtype=torch.bool)
    held[::_HELD_OUT_EVERY] = True
    known = labels != IGNORED
    tokens = torch.cat(model.tokens)
    features, targets = tokens[known].to(device), labels[known].to(device)
    chosen_by = held[known].to(device)
    fit, classes = ~chosen_by, int(targets[~chosen_by].unique().numel())
    if classes < 2 or len(targets) <= NEIGHBOURS:
        raise UserError(
            f"--segmentation {data.root}: {len(targets)} labelled patches in train, {classes} classes in those to fit "
            "to. Give more masks, of two classes at least."
        )
    mean, scale = standardisation(features[fit])  # one grid of strengths for every model
    rows = (features - mean) * scale
    fits = fit_logistic(rows[fit], targets[fit], num_classes=int(targets.max()) + 1, regularisations=REGULARISATIONS)
    best = int((fits.predict(rows[chosen_by]) == targets[chosen_by]).double().mean(1).argmax())
    weight = fits.weight[best] * scale
    return weight, fits.bias[best] - weight @ mean, features, targets


def _to_pixels(scores: Float[Tensor, "b n c"], size: int) -> Int64[Tensor, "b h w"]:
    side = round(scores.shape[1] ** 0.5)
    maps = scores.mT.unflatten(2, (side, side))
    return F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False).argmax(1)


def _confusion(predicted: Int64[Tensor, "b h w"], masks: Int64[Tensor, "b h w"]) -> Int64[Tensor, "c c"]:
    """Count pixels by true and predicted class, 256 x 256; ignored pixels are left out."""
    known = masks != IGNORED
    return torch.bincount(masks[known] * 256 + predicted[known], minlength=256**2).unflatten(0, (256, 256))
