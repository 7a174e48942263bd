"""What is done to an image: one frozen dataclass of crops, photometrics and masks, by name or by flags."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from common.errors import UserError, unknown_name
from common.files import json_sha256


@dataclass(frozen=True)
class Augmentation:
    """Crops, photometric distortion and masks of one image.

    Global crops come first in every list of views. Scales are shares of the image area, aspect ratios are
    width over height, jitter strengths are the half-widths of DINO's ColorJitter, blur sigmas are in pixels
    of the crop.

    Attributes:
        num_global_crops: views that the teacher sees too.
        num_local_crops: small views for the student only; may be 0.
        global_crops_size: side of a global crop in pixels.
        local_crops_size: side of a local crop in pixels.
        global_crops_scale: smallest and largest area share of a global crop.
        local_crops_scale: the same of a local crop.
        aspect_ratio: smallest and largest width over height, log-uniform between.
        flip_prob: probability of a horizontal flip.
        jitter_prob: probability that brightness, contrast, saturation and hue are all jittered.
        brightness, contrast, saturation, hue: jitter strengths; hue in turns.
        gray_prob: probability of luminance only.
        blur_prob_global: probability of a Gaussian blur, for each global crop.
        blur_prob_local: the same for local crops.
        blur_sigma: smallest and largest sigma, uniform between.
        solarize_prob_global: probability of inverting values >= 128, for each global crop.
        patch_size: side of a ViT patch in pixels.
        mask_patch_size: side of a mask unit in pixels, a multiple of `patch_size`.
        mask_ratio: share of the units of a masked crop that are masked; 0 for no masks.
        mask_min_units: smallest target area of a mask block in units, as far as that many are left.
        mask_aspect_ratio: smallest and largest width over height of a mask block.
        teacher_photometric: the teacher sees the student's distorted global crops, so their photometrics are
            fixed by the view set instead of drawn anew each epoch.

    Raises:
        UserError: a field is out of its range.
    """

    num_global_crops: int = 2
    num_local_crops: int = 8
    global_crops_size: int = 224
    local_crops_size: int = 96
    global_crops_scale: tuple[float, float] = (0.4, 1.0)
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_prob: float = 0.5
    jitter_prob: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray_prob: float = 0.2
    blur_prob_global: tuple[float, ...] = (1.0, 0.1)
    blur_prob_local: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_prob_global: tuple[float, ...] = (0.0, 0.2)
    patch_size: int = 16
    mask_patch_size: int = 32
    mask_ratio: float = 0.4
    mask_min_units: int = 4
    mask_aspect_ratio: tuple[float, float] = (0.3, 1 / 0.3)
    teacher_photometric: bool = False

    def __post_init__(self) -> None:
        _check_counts(self)
        _check_ranges(self)
        _check_grid(self)

    @property
    def num_crops(self) -> int:
        """Views of one image, global and local."""
        return self.num_global_crops + self.num_local_crops

    @property
    def num_patches(self) -> int:
        """Patches of one global crop."""
        return (self.global_crops_size // self.patch_size) ** 2

    @property
    def num_mask_units(self) -> int:
        """Mask units of one global crop."""
        return (self.global_crops_size // self.mask_patch_size) ** 2

    @property
    def num_masked_units(self) -> int:
        """Units masked on the one global crop of an image that is masked."""
        return round(self.mask_ratio * self.num_mask_units)

    @property
    def num_masked_patches(self) -> int:
        """Patches masked on the one global crop of an image that is masked."""
        return self.num_masked_units * (self.mask_patch_size // self.patch_size) ** 2

    def global_only(self) -> Augmentation:
        """The same without local crops; boxes and photometrics of the global crops stay what they are."""
        return replace(self, num_local_crops=0)

    def fingerprint(self) -> str:
        """Sha256 of every field; equal exactly when the whole augmentation is equal."""
        return json_sha256(asdict(self))

    def geometry_fingerprint(self) -> dict[str, object]:
        """Name everything that decides what the teacher sees of an image, given seed and view set.

        Local crops, masks and, unless `teacher_photometric`, all photometrics are left out: they may change
        under a teacher cache. JSON-serialisable; compare field by field.
        """
        fields: dict[str, object] = {
            "num_global_crops": self.num_global_crops,
            "global_crops_size": self.global_crops_size,
            "global_crops_scale": list(self.global_crops_scale),
            "aspect_ratio": list(self.aspect_ratio),
            "flip_prob": self.flip_prob,
            "resize": "keys cubic -0.5, antialiased, clamped at the image edge",
            "teacher_photometric": self.teacher_photometric,
        }
        if self.teacher_photometric:
            fields["photometric"] = {
                "jitter_prob": self.jitter_prob,
                "jitter": [self.brightness, self.contrast, self.saturation, self.hue],
                "gray_prob": self.gray_prob,
                "blur_prob_global": list(self.blur_prob_global),
                "blur_sigma": list(self.blur_sigma),
                "solarize_prob_global": list(self.solarize_prob_global),
            }
        return fields


def named_augmentation(name: str) -> Augmentation:
    """Return a named augmentation.

    Args:
        name: `dino`: Caron et al., "Emerging properties in self-supervised vision transformers" (2021), the
            defaults of its code; blur with probability 1, 0.1, 0.5 on the first global, the second global and
            the local crops. `dinov2_released`: what the released DINOv2 and DINOv3 code does, with the crop
            scales of its default configuration; its GaussianBlur hands p where 1 - p is meant, so blur is
            applied with probability 0, 0.9, 0.5. Solarize on the second global crop in both. `clean`: crops
            and flips of `dino` without any photometric distortion.

    Raises:
        UserError: none has that name; the message offers the closest.
    """
    if name in _NAMED:
        return _NAMED[name]
    raise unknown_name("--augmentation", name, _NAMED)


def _check_counts(a: Augmentation) -> None:
    _require(1 <= a.num_global_crops <= 16, "num_global_crops", a.num_global_crops, "from 1 to 16")
    _require(0 <= a.num_local_crops <= 64, "num_local_crops", a.num_local_crops, "from 0 to 64")
    for name in ("patch_size", "mask_patch_size", "mask_min_units"):
        value = getattr(a, name)
        _require(value >= 1, name, value, "at least 1")
    for name in ("global_crops_size", "local_crops_size"):
        value = getattr(a, name)
        _require(8 <= value <= 4096, name, value, "from 8 to 4096 pixels (the blur reads 4 on each side)")
    for name in ("blur_prob_global", "solarize_prob_global"):
        value = getattr(a, name)
        _require(len(value) == a.num_global_crops, name, value, f"{a.num_global_crops} values, one a crop")


def _check_ranges(a: Augmentation) -> None:
    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(a, name)
        _require(0 < low <= high <= 1, name, (low, high), "0 < low <= high <= 1")
    for name in ("aspect_ratio", "mask_aspect_ratio"):
        low, high = getattr(a, name)
        _require(1 / 256 <= low <= high <= 256, name, (low, high), "1/256 <= low <= high <= 256")
    low, high = a.blur_sigma
    _require(0 < low <= high, "blur_sigma", (low, high), "0 < low <= high")
    shares = ["flip_prob", "jitter_prob", "gray_prob", "blur_prob_local", "mask_ratio"]
    shares += ["brightness", "contrast", "saturation"]
    for name in shares:
        value = getattr(a, name)
        _require(0 <= value <= 1, name, value, "from 0 to 1")
    _require(0 <= a.hue <= 0.5, "hue", a.hue, "from 0 to 0.5 turns")
    for name in ("blur_prob_global", "solarize_prob_global"):
        value = getattr(a, name)
        _require(all(0 <= p <= 1 for p in value), name, value, "probabilities from 0 to 1")


def _check_grid(a: Augmentation) -> None:
    patch, unit, side = a.patch_size, a.mask_patch_size, a.global_crops_size
    _require(side % patch == 0, "global_crops_size", side, f"a multiple of patch_size {patch}")
    if a.num_local_crops:
        local = a.local_crops_size
        _require(local % patch == 0, "local_crops_size", local, f"a multiple of patch_size {patch}")
    if a.mask_ratio > 0:
        _require(unit % patch == 0, "mask_patch_size", unit, f"a multiple of patch_size {patch}")
        _require(side % unit == 0, "mask_patch_size", unit, f"a divisor of global_crops_size {side}")


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(f"augmentation: {name} is {value}. It must be {allowed}. Change {name}.")


_NAMED = {
    "dino": Augmentation(),
    "dinov2_released": Augmentation(
        global_crops_scale=(0.32, 1.0), local_crops_scale=(0.05, 0.32), blur_prob_global=(0.0, 0.9)
    ),
    "clean": Augmentation(
        jitter_prob=0.0,
        gray_prob=0.0,
        blur_prob_global=(0.0, 0.0),
        blur_prob_local=0.0,
        solarize_prob_global=(0.0, 0.0),
    ),
}


@dataclass(frozen=True, kw_only=True)
class CropOptions:
    """What is cut of an image, as flags over a named augmentation."""

    augmentation: str = "dino"
    """The augmentation that the flags go over: dino, dinov2_released or clean."""
    global_crops_number: int = Augmentation.num_global_crops
    """Global crops of an image, 1 or 2: those that the teacher sees, at its cost."""
    global_crops_scale: tuple[float, float] | None = None
    """Share of the image's area in a global crop, least and most. None: the augmentation's own, 0.4 1.0 for dino."""
    global_crops_size: int = Augmentation.global_crops_size
    """Side of a global crop in pixels."""
    local_crops_scale: tuple[float, float] | None = None
    """Share of the image's area in a local crop, least and most. None: the augmentation's own, 0.05 0.4 for dino."""
    local_crops_number: int = Augmentation.num_local_crops
    """Local crops of an image."""
    local_crops_size: int = Augmentation.local_crops_size
    """Side of a local crop in pixels."""
    mask_patch_size: int = Augmentation.mask_patch_size
    """Side of a mask unit in pixels."""
    mask_ratio: float = Augmentation.mask_ratio
    """Share of masked units on a masked crop."""
    flip_prob: float = Augmentation.flip_prob
    """Probability of a horizontal flip."""
    teacher_photometric: bool = Augmentation.teacher_photometric
    """The teacher sees the student's photometric distortions too; then all of them are replayed."""
    data_seed: int = 0
    """Seed of crops, order, masks and prototypes; a cache is bound to the one it was built with."""

    def crops(self, *, patch_size: int) -> Augmentation:
        """Return the augmentation for a student of that patch size; UserError for a value out of its range."""
        chosen, g = named_augmentation(self.augmentation), self.global_crops_number
        if not 1 <= g <= chosen.num_global_crops:
            raise UserError(f"--global_crops_number {g}: it must be 1 or 2. Change --global_crops_number.")
        return replace(
            chosen,
            num_global_crops=g,
            blur_prob_global=chosen.blur_prob_global[:g],
            solarize_prob_global=chosen.solarize_prob_global[:g],
            global_crops_scale=self.global_crops_scale or chosen.global_crops_scale,
            global_crops_size=self.global_crops_size,
            local_crops_scale=self.local_crops_scale or chosen.local_crops_scale,
            local_crops_size=self.local_crops_size,
            num_local_crops=self.local_crops_number,
            patch_size=patch_size,
            mask_patch_size=self.mask_patch_size,
            mask_ratio=self.mask_ratio,
            flip_prob=self.flip_prob,
            teacher_photometric=self.teacher_photometric,
        )

    def teacher_crops(self) -> Augmentation:
        """Return the augmentation of which only what decides the teacher's crops matters: no locals, no masks."""
        return replace(self, local_crops_number=0, mask_ratio=0.0, mask_patch_size=1).crops(patch_size=1)
