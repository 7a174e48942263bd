"""Schedules: pure functions of the step."""

from __future__ import annotations

import math

import torch

from distill.config import TrainConfig
from distill.prototypes import Prototypes
from distill.step import StepScalars


def cosine_schedule(step: int, *, start: float, end: float, total_steps: int, warmup_steps: int = 0) -> float:
    """Linear warm-up from 0 to `start`, then a half cosine to `end` at the last step.

    Args:
        step: step about to be taken, from 0.
        start: value after the warm-up.
        end: value at step `total_steps - 1` and beyond.
        total_steps: steps of the run.
        warmup_steps: steps of the linear warm-up.
    """
    if step < warmup_steps:
        return start * (step + 1) / warmup_steps
    length = max(total_steps - warmup_steps - 1, 1)
    progress = min((step - warmup_steps) / length, 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def linear_warmup(step: int, *, start: float, end: float, warmup_steps: int) -> float:
    """Rise (or fall) linearly from `start` at step 0 to `end` at `warmup_steps`, and stay there."""
    if step >= warmup_steps:
        return end
    return start + (end - start) * step / warmup_steps


def scaled_lr(lr: float, global_batch_size: int, rule: str) -> float:
    """Scale a learning rate given for 256 images to the global batch, by the "linear" or the "sqrt" rule."""
    ratio = global_batch_size / 256
    return lr * (ratio if rule == "linear" else math.sqrt(ratio))


class Schedule:
    """All scheduled quantities of a run, from its configuration and the length of an epoch."""

    def __init__(
        self,
        config: TrainConfig,
        prototypes: Prototypes,
        *,
        steps_per_epoch: int,
        total_steps: int,
        global_batch_size: int,
        device: torch.device,
    ) -> None:
        self._config = config
        self._prototypes = prototypes
        self._steps_per_epoch = steps_per_epoch
        self._total_steps = total_steps
        self._peak_lr = scaled_lr(config.optim.lr, global_batch_size, config.optim.lr_scaling)
        self._device = device

    def epoch(self, step: int) -> float:
        """Epochs that `step` steps have gone through."""
        return step / self._steps_per_epoch

    def lr(self, step: int) -> float:
        """Learning rate of a step about to be taken."""
        return cosine_schedule(
            step,
            start=self._peak_lr,
            end=min(self._config.optim.min_lr, self._peak_lr),
            total_steps=self._total_steps,
            warmup_steps=min(round(self._config.optim.warmup_epochs * self._steps_per_epoch), self._total_steps // 2),
        )

    def ema_momentum(self, step: int) -> float:
        """Momentum of the student's EMA after a step; rises to 1 by a cosine."""
        return cosine_schedule(step, start=self._config.optim.ema_momentum, end=1.0, total_steps=self._total_steps)

    def teacher_temps(self, step: int) -> tuple[float, float]:
        """Teacher temperatures of the cls and the patch targets."""
        config = self._config.prototypes
        if config.teacher_temp == "calibrated":
            return self._prototypes.cls.calibrated_temp.item(), self._prototypes.patch.calibrated_temp.item()
        temperature = linear_warmup(
            step,
            start=config.teacher_temp_start,
            end=config.teacher_temp_end,
            warmup_steps=round(config.teacher_temp_warmup_epochs * self._steps_per_epoch),
        )
        return temperature, temperature

    def scalars(self, step: int) -> StepScalars:
        """Return the step's scheduled inputs as 0-d tensors, so that a new value compiles nothing anew."""
        koleo = linear_warmup(step, start=0.0, end=1.0, warmup_steps=self._config.losses.koleo_warmup_steps)
        host = torch.tensor([*self.teacher_temps(step), koleo])
        return StepScalars(*host.to(self._device, non_blocking=True).unbind())

    def knn_due(self, step: int) -> bool:
        """Whether an evaluation is due after `step` steps; always after the last one, where any is."""
        every = self._config.runtime.knn_every_epochs
        if not every or self._config.data.val_data_path is None:
            return False
        return due(step, max(round(every * self._steps_per_epoch), 1)) or step == self._total_steps


def due(step: int, every: int) -> bool:
    """Whether something done every `every` steps is due after `step` steps; 0 is never."""
    return every > 0 and step % every == 0
