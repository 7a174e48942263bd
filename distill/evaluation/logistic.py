"""Linear classifiers: logistic regression by torch's L-BFGS on preconditioned axes, and DINOv2's grid of SGD rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from common.errors import UserError

# Logits held at once: 2^24 fp32 numbers are 64 MB, and about four such buffers are alive.
BLOCK_ELEMENTS = 2**24
# Iterations between two looks at how far the optimum can be.
CHECK_EVERY = 20


@dataclass(frozen=True)
class LinearFits:
    """Linear classifiers of `p` settings.

    Attributes:
        weight: [p, c, d].
        bias: [p, c]; not regularised.
        loss: objective of each, fp64 [p].
        converged: whether the optimum is within the tolerance, [p].
    """

    weight: Float[Tensor, "p c d"]
    bias: Float[Tensor, "p c"]
    loss: Float[Tensor, " p"]
    converged: Bool[Tensor, " p"]

    def predict(self, features: Float[Tensor, "n d"], *, block_rows: int = 16384) -> Int64[Tensor, "p n"]:
        """Class of each row by each of the classifiers."""
        flat = self.weight.flatten(0, 1)  # [p * c, d]
        parts = []
        for block in features.split(block_rows):
            logits = (block @ flat.T + self.bias.flatten()).unflatten(1, self.bias.shape)  # [r, p, c]
            parts.append(logits.argmax(dim=2).T)
        return torch.cat(parts, dim=1)


def fit_logistic(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    *,
    num_classes: int,
    regularisations: Sequence[float],
    tolerance: float = 1e-2,
    max_iterations: int = 1000,
    start: tuple[Float[Tensor, "c d"], Float[Tensor, " c"]] | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> LinearFits:
    """Minimise mean cross-entropy + lambda / 2 * ||W||^2 for each lambda, each from the solution before.

    lambda is 1 / (C n) of scikit-learn's `LogisticRegression(C=C)` on n rows. The problem is solved in the principal
    axes of the features, a rotation and a shift that leave it the same problem; there the Hessian at W = 0 is nearly
    diagonal, and each axis is scaled by the root of its inverse.

    Args:
        features: fp32 or fp64; the arithmetic's dtype.
        labels: 0 .. num_classes - 1, on the same device.
        num_classes: c.
        regularisations: one lambda > 0 a problem; strongest first is fastest.
        tolerance: on ||gradient in W||^2 / (2 lambda), which bounds the distance of the objective from its optimum
            (strong convexity), as a share of the objective.
        max_iterations: limit for each; problems that reach it are marked as not converged.
        start: weight and bias to start from; zeros if absent.
        block_elements: logits computed at once; bounds the memory.
    """
    # L-BFGS needs few iterations where the curvature is alike in all directions: first turn, then scale the axes.
    mean, variance, rotation = _principal_axes(features)
    rows = (features - mean) @ rotation
    point = features.new_zeros(num_classes, features.shape[1] + 1)
    if start is not None:
        weight, bias = start
        point = torch.cat([weight @ rotation, (bias + weight @ mean)[:, None]], dim=1)
    points, losses, converged = [], [], []
    for strength in regularisations:
        penalty = features.new_full((features.shape[1] + 1,), strength)
        penalty[-1] = 0
        # The bias sees a constant 1; softmax has curvature 1 / c at W = 0.
        scale = (torch.cat([variance, variance.new_ones(1)]) / num_classes + penalty).rsqrt()
        objective = _Objective(rows, labels, penalty, block_elements)
        point, loss, done = _minimise(objective, point, scale, strength, tolerance, max_iterations)
        points.append(point)
        losses.append(loss)
        converged.append(done)
    found = torch.stack(points)
    weight = found[:, :, :-1] @ rotation.T
    return LinearFits(
        weight=weight,
        bias=found[:, :, -1] - weight @ mean,
        loss=torch.stack(losses),
        converged=torch.tensor(converged, device=features.device),
    )


def _minimise(
    objective: _Objective, start: Tensor, scale: Tensor, strength: float, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor, bool]:
    """Return the point, its loss, and whether the optimum is within the tolerance."""
    scaled = (start / scale).requires_grad_()
    # Its own stopping rules are off: they look at the size of a step, and the gap below bounds the objective itself.
    solver = torch.optim.LBFGS(
        [scaled],
        max_iter=CHECK_EVERY,
        history_size=10,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss, gradient = objective(scaled.detach() * scale)
        scaled.grad = gradient * scale  # chain rule of the scaled axes; no autograd, so no graph over all rows
        return loss

    done, before = False, float("inf")
    for iterations in range(0, max_iterations + 1, CHECK_EVERY):
        loss, gradient = objective(scaled.detach() * scale)
        # One look a round: reading the values makes the host wait for the device.
        gap = float(gradient[:, :-1].square().sum()) / (2 * strength)
        done = gap <= tolerance * float(loss)
        # Where a round no longer gains a digit of the arithmetic, more rounds will not.
        if done or iterations >= max_iterations or float(loss) >= before:
            break
        before = float(loss)
        solver.step(closure)
    return scaled.detach() * scale, loss, done


def _principal_axes(features: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean [d], variances [d] and axes [d, d], in columns.

    A rotation keeps ||W||, and the bias, which is not regularised, takes up the shift.
    """
    mean, dim = features.mean(dim=0), features.shape[1]
    # fp64: the sum over blocks and the smallest eigenvalues of nearly collinear features need its digits.
    covariance = torch.zeros(dim, dim, dtype=torch.float64, device=features.device)
    for rows in features.split(max(1, BLOCK_ELEMENTS // dim)):
        centred = rows - mean
        covariance += (centred.T @ centred).double() / len(features)
    variance, rotation = torch.linalg.eigh(covariance)
    return mean, variance.clamp_min(0).to(features.dtype), rotation.to(features.dtype)


@dataclass(frozen=True)
class _Objective:
    """Loss (fp64) and gradient at weights with the bias as their last column [c, d + 1], over blocks of rows."""

    features: Tensor
    labels: Tensor
    penalty: Tensor
    block_elements: int

    def __call__(self, point: Float[Tensor, "c e"]) -> tuple[Tensor, Tensor]:
        weight, bias = point[:, :-1], point[:, -1]
        # The sum over rows is kept in fp64: the line search compares losses that differ in the last digits.
        total = torch.zeros((), dtype=torch.float64, device=point.device)
        gradient = torch.zeros_like(point)
        at_once = max(1, self.block_elements // len(bias))
        for rows, labels in zip(self.features.split(at_once), self.labels.split(at_once), strict=True):
            logits = torch.addmm(bias, rows, weight.T)  # [r, c]
            # Odds against the right class, not its probability, which is near 1 and would leave few digits of the loss.
            # In place: the logits are the largest buffer.
            own = torch.arange(len(labels), device=labels.device), labels
            logits -= logits[own][:, None]
            logits[own] = -torch.inf
            log_odds = logits.logsumexp(dim=1)
            row_loss = F.softplus(log_odds)
            total += row_loss.double().sum()
            # The gradient in the logits is softmax less one-hot.
            error = logits.sub_(row_loss[:, None]).exp_()
            error[own] = -torch.sigmoid(log_odds)
            gradient[:, :-1].addmm_(error.T, rows)
            gradient[:, -1] += error.sum(dim=0)
        count = len(self.labels)
        penalised = self.penalty * point
        return total / count + 0.5 * (penalised * point).double().sum(), gradient / count + penalised


@dataclass(frozen=True)
class SgdProtocol:
    """DINOv2's settings, on fixed centre-crop features: there is no augmentation here.

    Attributes:
        learning_rates: base rates; the rate is base * batch_size / 256.
        epochs: passes over the rows.
        batch_size: rows a step; all rows where there are fewer.
        momentum: of SGD; no weight decay.
    """

    learning_rates: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
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
    features: Float[Tensor, "n d"], labels: Int64[Tensor, " n"], *, num_classes: int, protocol: SgdProtocol, seed: int
) -> LinearFits:
    """Train one linear classifier a learning rate, all on the same batches.

    SGD with momentum, cosine decay to zero, weights from N(0, 0.01^2), biases zero. Rows are reshuffled every epoch;
    an epoch's last partial batch is dropped.

    Args:
        features: fp32 [n, d], as extracted (not standardised).
        labels: 0 .. num_classes - 1.
        num_classes: c.
        protocol: base rates, one classifier each; epochs, batch size and momentum.
        seed: of initialisation and order; drawn on the CPU, so it does not depend on the device.

    Returns:
        The classifiers; `loss` is the mean cross-entropy of the last batch, `converged` is true of all.
    """
    learning_rates, batch_size = protocol.learning_rates, min(protocol.batch_size, len(labels))
    generator = torch.Generator().manual_seed(seed)
    shape = (num_classes, features.shape[1])
    # All start alike, so that they differ by their rate alone.
    initial = torch.randn(shape, generator=generator) * 0.01
    weight = initial.to(features).repeat(len(learning_rates), 1, 1)  # [p, c, d]
    bias = features.new_zeros(len(learning_rates), num_classes)
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    peak = torch.tensor(learning_rates).to(features) * (batch_size / 256)
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
        # The gradient of mean cross-entropy in the logits, by hand: softmax less one-hot, of all classifiers at once.
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
