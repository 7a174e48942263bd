"""AdamW parameter groups, clipping without a host sync, the student's EMA, and the schedules of a run."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from common.errors import UserError
from distill.config import OptimConfig, TrainConfig
from distill.models import statistics_names
from distill.prototypes import Prototypes
from distill.step import DistillStep, StepScalars


def create_optimizer(step: DistillStep, config: OptimConfig) -> torch.optim.AdamW:
    """Create fused AdamW over the trainable parameters of a step.

    Each group carries `lr_scale`, the factor on the scheduled rate: layer decay per block, and the patch
    embedding's own. Vectors (biases, norms, tokens, LayerScale) get no weight decay.
    """
    depth = len(getattr(step.student, "blocks", ()))
    if not depth and config.layer_decay != 1:
        raise UserError(
            f"--layer_decay {config.layer_decay}: the student has no blocks that it could go by. Leave it at 1."
        )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in step.named_parameters():
        if not parameter.requires_grad:
            continue
        is_vector = parameter.squeeze().ndim <= 1 or name.endswith(("_token", "pos_embed"))
        decay = 0.0 if is_vector else config.weight_decay
        groups.setdefault((_lr_scale(name, depth, config), decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr_scale": scale, "weight_decay": decay}
            for (scale, decay), parameters in groups.items()
        ],
        lr=0.0,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def _lr_scale(name: str, depth: int, config: OptimConfig) -> float:
    if not name.startswith("student."):
        return 1.0
    block = re.match(r"student\.blocks\.(\d+)\.", name)
    if block:
        return config.layer_decay ** (depth - 1 - int(block[1]))
    if name.startswith("student.norm."):
        return 1.0
    scale = config.layer_decay**depth
    return scale * config.patch_embed_lr_scale if ".patch_embed." in name else scale


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the scheduled rate, times each group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Clip gradients by their total norm, without a host sync.

    Args:
        parameters: those without a gradient are passed over.
        max_norm: largest norm; 0 leaves the gradients as they are.
        loss: the step's loss, 0-d.

    Returns:
        The norm before clipping, and a flag that is 1 where loss or norm is not finite; 0-d each.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm, (~(torch.isfinite(norm) & torch.isfinite(loss))).float()


def skip_update(optimizer: torch.optim.Optimizer, flag: Tensor) -> None:
    """Make the next step of a fused optimizer a no-op on the device where `flag` (0-d) is 1.

    `found_inf` is what fused optimizers read from gradient scalers.
    """
    optimizer.found_inf = flag  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]


class StudentEma:
    """Exponential moving average of the student, for evaluation and export."""

    def __init__(self, student: nn.Module) -> None:
        self.model = copy.deepcopy(student).eval().requires_grad_(False)
        self._statistics = statistics_names(student)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """Move the average towards the student: ema = momentum * ema + (1 - momentum) * student."""
        torch._foreach_lerp_(list(self.model.parameters()), list(student.parameters()), 1 - momentum)
        for name in self._statistics:  # averages already
            self.model.get_buffer(name).copy_(student.get_buffer(name))


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
        # Read once: on a GPU each reading waits for all that was launched before it.
        self._calibrated_temps = prototypes.cls.calibrated_temp.item(), prototypes.patch.calibrated_temp.item()
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
            return self._calibrated_temps
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
