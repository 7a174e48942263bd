"""Cuts a crop-major batch into micro-batches of images, for gradient accumulation and cheap measurements."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from distill.targets import TeacherTargets
from pipeline.batch import MultiCropBatch


@dataclass(frozen=True)
class StepInputs:
    """The tensors of one batch in the order `DistillStep` takes them; see `MultiCropBatch`, `TeacherTargets`."""

    global_crops: UInt8[Tensor, "gb G G 3"]
    local_crops: UInt8[Tensor, "lb L L 3"]
    masks: Bool[Tensor, "gb n"]
    masked_indices: Int64[Tensor, " m"]
    teacher_cls: Float[Tensor, "b g d"]
    teacher_patches: Float[Tensor, "b g n d"]

    @staticmethod
    def of(batch: MultiCropBatch, targets: TeacherTargets) -> StepInputs:
        """Join a batch with its targets."""
        return StepInputs(
            batch.global_crops,
            batch.local_crops,
            batch.masks,
            batch.masked_indices,
            targets.cls,
            targets.patches,
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the fields in order."""
        return (
            self.global_crops,
            self.local_crops,
            self.masks,
            self.masked_indices,
            self.teacher_cls,
            self.teacher_patches,
        )

    def micro_batches(self, number: int) -> list[StepInputs]:
        """Cut into `number` micro-batches of consecutive images, without a host sync.

        Every image has the same number of masked patches, so the cut keeps static shapes.
        """
        b = self.teacher_cls.shape[0]
        assert b % number == 0, f"{b} images do not split into {number}"
        size = b // number
        return [self._images(i * size, size) for i in range(number)] if number > 1 else [self]

    def _images(self, first: int, size: int) -> StepInputs:
        b, n = self.teacher_cls.shape[0], self.masks.shape[1]

        def cut(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, b))[:, first : first + size].flatten(0, 1) if x.shape[0] else x

        crop, patch = self.masked_indices // n, self.masked_indices % n
        image, view = crop % b, crop // b
        by_image = torch.argsort(image, stable=True).unflatten(0, (b, -1))[first : first + size].flatten()
        indices = (view[by_image] * size + image[by_image] - first) * n + patch[by_image]
        return StepInputs(
            cut(self.global_crops),
            cut(self.local_crops),
            cut(self.masks),
            indices.sort().values,
            self.teacher_cls[first : first + size],
            self.teacher_patches[first : first + size],
        )
