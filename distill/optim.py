"""AdamW parameter groups, gradient clipping without a host sync, and the student's EMA."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable

import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from distill.config import OptimConfig
from distill.step import DistillStep


def create_optimizer(step: DistillStep, config: OptimConfig) -> torch.optim.AdamW:
    """Create fused AdamW over the trainable parameters of a step.

    Each group carries `lr_scale`, the factor on the scheduled rate: layer decay per block, and the patch
    embedding's own. Vectors (biases, norms, tokens, LayerScale) get no weight decay.
    """
    depth = len(step.student.blocks)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in step.named_parameters():
        if not parameter.requires_grad:
            continue
        is_vector = parameter.squeeze().ndim <= 1 or name.endswith("_token")
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

    def __init__(self, student: Eva) -> None:
        self.model: Eva = copy.deepcopy(student).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, student: Eva, momentum: float) -> None:
        """Move the average towards the student: ema = momentum * ema + (1 - momentum) * student."""
        torch._foreach_lerp_(list(self.model.parameters()), list(student.parameters()), 1 - momentum)
