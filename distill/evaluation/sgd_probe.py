"""Linear classifiers by SGD for a grid of learning rates at once, after DINOv2's linear evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from common.errors import UserError
from distill.evaluation.logistic import LinearFits

DINOV2_LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


@dataclass(frozen=True)
class SgdProtocol:
    """DINOv2's settings, on fixed centre-crop features: there is no augmentation here.

    Attributes:
        learning_rates: base rates; the rate is base * batch_size / 256.
        epochs: passes over the rows.
        batch_size: rows a step; all rows where there are fewer.
        momentum: of SGD; no weight decay.
    """

    learning_rates: tuple[float, ...] = DINOV2_LEARNING_RATES
    epochs: int = 10
    batch_size: int = 1024
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not self.learning_rates or min(self.learning_rates) <= 0 or min(self.epochs, self.batch_size) < 1:
            raise UserError(
                f"--learning_rates {self.learning_rates}, --epochs {self.epochs}, --batch_size {self.batch_size}: "
                "rates must be above 0, and there must be one rate, one epoch and one row a step at least."
            )


def fit_sgd(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    *,
    num_classes: int,
    learning_rates: Sequence[float],
    protocol: SgdProtocol,
    seed: int,
) -> LinearFits:
    """Train one linear classifier a learning rate, all on the same batches.

    SGD with momentum, cosine decay to zero, weights from N(0, 0.01^2), biases zero. Rows are reshuffled every epoch;
    an epoch's last partial batch is dropped.

    Args:
        features: fp32 [n, d], as extracted (not standardised).
        labels: 0 .. num_classes - 1.
        num_classes: c.
        learning_rates: base rates, one classifier each.
        protocol: epochs, batch size and momentum.
        seed: of initialisation and order; drawn on the CPU, so it does not depend on the device.

    Returns:
        The classifiers; `loss` is the mean cross-entropy of the last batch, `converged` is true of all.
    """
    batch_size = min(protocol.batch_size, len(labels))
    generator = torch.Generator().manual_seed(seed)
    shape = (num_classes, features.shape[1])
    initial = torch.randn(shape, generator=generator) * 0.01
    weight = initial.to(features).repeat(len(learning_rates), 1, 1)  # [p, c, d]
    bias = features.new_zeros(len(learning_rates), num_classes)
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    peak = torch.tensor(list(learning_rates)).to(features) * (batch_size / 256)
    loss = features.new_zeros(len(learning_rates))
    steps_per_epoch = len(labels) // batch_size
    num_steps = protocol.epochs * steps_per_epoch
    for step in range(num_steps):
        if step % steps_per_epoch == 0:
            order = torch.randperm(len(labels), generator=generator).to(features.device)
        rows = order[step % steps_per_epoch * batch_size :][:batch_size]
        batch, target = features[rows], labels[rows]
        logits = torch.addmm(bias.flatten(), batch, weight.flatten(0, 1).T).unflatten(1, bias.shape)  # [r, p, c]
        log_probs = logits.log_softmax(dim=2)
        index = target[:, None, None].expand(-1, len(learning_rates), 1)
        error = log_probs.exp().scatter_add(2, index, torch.full_like(logits[:, :, :1], -1.0)) / batch_size
        weight_velocity.mul_(protocol.momentum).add_((error.flatten(1).T @ batch).view_as(weight))
        bias_velocity.mul_(protocol.momentum).add_(error.sum(dim=0))
        rate = peak * (0.5 * (1 + math.cos(math.pi * step / num_steps)))
        weight -= rate[:, None, None] * weight_velocity
        bias -= rate[:, None] * bias_velocity
        if step == num_steps - 1:
            loss = -log_probs.gather(2, index).mean(dim=(0, 2))
    return LinearFits(
        weight=weight,
        bias=bias,
        loss=loss.double(),
        converged=torch.ones(len(learning_rates), dtype=torch.bool, device=features.device),
    )
