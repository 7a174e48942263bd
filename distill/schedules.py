"""Schedules: pure functions of the step."""

from __future__ import annotations

import math


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
