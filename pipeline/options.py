"""The options of crops and of reading them: the same flags, with the same meaning, for every command."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from pipeline.augmentation import Augmentation, preset


@dataclass(frozen=True, kw_only=True)
class CropOptions:
    """What is cut of an image, as flags over an augmentation preset."""

    augmentation: str = "dino"
    """Augmentation preset: dino or dinov2_released."""
    global_crops_scale: tuple[float, float] | None = None
    """Share of the image's area in a global crop, least and most. None: the preset's own, 0.4 1.0 for dino."""
    global_crops_size: int = Augmentation.global_crops_size
    """Side of a global crop in pixels."""
    local_crops_scale: tuple[float, float] | None = None
    """Share of the image's area in a local crop, least and most. None: the preset's own, 0.05 0.4 for dino."""
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
        chosen = preset(self.augmentation)
        return replace(
            chosen,
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


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Who decodes and crops, and with what."""

    backend: Literal["auto", "dali", "cpu", "torch"] = "auto"
    """Who decodes and crops."""
    num_threads: int | None = None
    """Decoding threads of a process. None: one a core, at most 8."""
    hw_decoder: bool = False
    """With DALI on a GPU: decode all JPEGs by the hardware engine. Its pixels are not those of the CUDA decoder."""

    def reading(self) -> dict[str, Any]:
        """Return these options as keywords of the loader and the readers."""
        return {field.name: getattr(self, field.name) for field in fields(ReadOptions)}
