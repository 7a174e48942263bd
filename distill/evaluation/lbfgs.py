"""Multinomial logistic regression for many regularisations at once, by one batched L-BFGS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

ARMIJO = 1e-4
MAX_HALVINGS = 25
# Logits held at once: 2^24 fp32 numbers are 64 MB, and about four such buffers are alive.
BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True)
class LogisticFit:
    """Solutions of `p` problems that differ in their regularisation only.

    Attributes:
        weight: [p, c, d].
        bias: [p, c]; not regularised.
        loss: objective at the solution, fp64 [p].
        converged: whether the largest gradient entry fell to the tolerance, [p].
        iterations: L-BFGS iterations of the slowest problem.
    """

    weight: Float[Tensor, "p c d"]
    bias: Float[Tensor, "p c"]
    loss: Float[Tensor, " p"]
    converged: Bool[Tensor, " p"]
    iterations: int

    def predict(self, features: Float[Tensor, "n d"], *, block_rows: int = 16384) -> Int64[Tensor, "p n"]:
        """Class of each row under each of the problems."""
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
    tolerance: float = 1e-5,
    max_iterations: int = 500,
    history: int = 10,
    start: LogisticFit | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> LogisticFit:
    """Minimise mean cross-entropy + lambda / 2 * ||W||^2 for each lambda, in one batched run.

    lambda is 1 / (C n) of scikit-learn's `LogisticRegression(C=C)` on n rows. Each problem has its own
    curvature pairs and step length (L-BFGS with the two-loop recursion, Nocedal & Wright, "Numerical
    Optimization", alg. 7.4, and Armijo backtracking); the matrix products are shared, and a problem that has
    converged leaves them.

    The problem is solved in the principal axes of the features, a rotation and a shift that leave it the same
    problem; there the Hessian at W = 0 is nearly diagonal, and its inverse is where L-BFGS starts from.

    Args:
        features: fp32 or fp64; the arithmetic's dtype.
        labels: 0 .. num_classes - 1, on the same device.
        num_classes: c.
        regularisations: one lambda > 0 a problem.
        tolerance: on the largest absolute entry of the gradient.
        max_iterations: limit; problems that reach it are marked as not converged.
        history: curvature pairs kept.
        start: a solution to start from (same p, c, d); zeros if absent.
        block_elements: logits computed at once; bounds the memory.
    """
    axes = _PrincipalAxes(features)
    problem = _Objective(axes.to_axes(features), labels, num_classes, regularisations, block_elements)
    shape = (len(regularisations), num_classes, features.shape[1] + 1)
    point = features.new_zeros(shape) if start is None else axes.parameters(start.weight, start.bias)
    point = point.flatten(1)
    memory = _CurvatureMemory(history, problem.inverse_curvature(axes.variance))
    everything = torch.arange(len(point), device=point.device)
    loss, gradient = problem(point, everything)
    converged = gradient.abs().amax(dim=1) <= tolerance
    stalled = torch.zeros_like(converged)
    iterations = 0
    while iterations < max_iterations:
        active = (~(converged | stalled)).nonzero().flatten()
        if len(active) == 0:
            break
        direction = memory.direction(gradient)
        step, new_loss, new_gradient = _backtrack(problem, point, direction, gradient, loss, active)
        moved = step > 0
        stalled |= ~moved & ~converged
        change = step[:, None] * direction
        memory.add(change, torch.where(moved[:, None], new_gradient - gradient, 0.0))
        point += change
        loss = torch.where(moved, new_loss, loss)
        gradient = torch.where(moved[:, None], new_gradient, gradient)
        converged |= gradient.abs().amax(dim=1) <= tolerance
        iterations += 1
    weight, bias = axes.from_axes(point.unflatten(1, shape[1:]))
    return LogisticFit(weight=weight, bias=bias, loss=loss, converged=converged, iterations=iterations)


class _PrincipalAxes:
    """Features centred and rotated to their principal axes, and classifiers to and from there.

    A rotation keeps ||W||, and the bias, which is not regularised, takes up the shift.
    """

    def __init__(self, features: Float[Tensor, "n d"]) -> None:
        self.mean = features.mean(dim=0)
        dim = features.shape[1]
        covariance = torch.zeros(dim, dim, dtype=torch.float64, device=features.device)
        for rows in features.split(max(1, BLOCK_ELEMENTS // dim)):
            centred = rows - self.mean
            covariance += (centred.T @ centred).double() / len(features)
        variance, rotation = torch.linalg.eigh(covariance)
        self.variance = variance.clamp_min(0).to(features.dtype)
        self.rotation = rotation.to(features.dtype)  # columns are axes

    def to_axes(self, features: Tensor) -> Tensor:
        """Coordinates of the features, [n, d]."""
        return (features - self.mean) @ self.rotation

    def parameters(self, weight: Float[Tensor, "p c d"], bias: Float[Tensor, "p c"]) -> Float[Tensor, "p c e"]:
        """Weights and, last, bias of the same classifiers on the coordinates; e = d + 1."""
        return torch.cat([weight @ self.rotation, (bias + weight @ self.mean)[:, :, None]], dim=2)

    def from_axes(self, parameters: Float[Tensor, "p c e"]) -> tuple[Tensor, Tensor]:
        """Weights and biases on the features themselves."""
        weight = parameters[:, :, :-1] @ self.rotation.T
        return weight, parameters[:, :, -1] - weight @ self.mean


class _Objective:
    """Loss and gradient of some of the problems at their points, over blocks of rows."""

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        num_classes: int,
        regularisations: Sequence[float],
        block_elements: int,
    ) -> None:
        self.features = features
        self.labels = labels
        self.num_classes = num_classes
        self.regularisations = torch.tensor(list(regularisations), dtype=features.dtype, device=features.device)
        self.block_elements = block_elements

    def inverse_curvature(self, variance: Float[Tensor, " d"]) -> Float[Tensor, "p e"]:
        """Diagonal of the inverse Hessian at W = 0 on principal axes, where softmax has curvature 1 / c."""
        variance = torch.cat([variance, variance.new_ones(1)])  # [d + 1]; the bias sees a constant 1
        strength = self.regularisations[:, None].expand(-1, len(variance)).clone()
        strength[:, -1] = 0
        inverse = 1 / (variance / self.num_classes + strength)  # [p, d + 1]
        return inverse[:, None].expand(-1, self.num_classes, -1).flatten(1)

    def __call__(self, point: Float[Tensor, "p e"], chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Loss fp64 [p] and gradient [p, e]; rows outside `chosen` are zero and cost nothing."""
        parameters = point[chosen].unflatten(1, (self.num_classes, -1))  # [a, c, d + 1]
        flat, bias = parameters[:, :, :-1].flatten(0, 1), parameters[:, :, -1].flatten()
        # The sum over rows is kept in fp64: the line search compares losses that differ in the last digits.
        total = torch.zeros(len(chosen), dtype=torch.float64, device=point.device)
        weight_gradient, bias_gradient = torch.zeros_like(flat), torch.zeros_like(bias)
        rows_at_once = max(1, self.block_elements // max(1, len(bias)))
        blocks = zip(self.features.split(rows_at_once), self.labels.split(rows_at_once), strict=True)
        for rows, labels in blocks:
            logits = torch.addmm(bias, rows, flat.T).unflatten(1, (len(chosen), -1))  # [r, a, c]
            index = labels[:, None, None].expand(-1, len(chosen), 1)
            log_sum = logits.logsumexp(dim=2, keepdim=True)
            total += (log_sum - logits.gather(2, index)).double().sum(dim=(0, 2))
            error = logits.sub_(log_sum).exp_()
            error.scatter_add_(2, index, error.new_full(index.shape, -1.0))
            weight_gradient.addmm_(error.flatten(1).T, rows)
            bias_gradient += error.flatten(1).sum(dim=0)
        count = len(self.labels)
        weights = parameters[:, :, :-1]
        strength = self.regularisations[chosen]
        loss = total / count + 0.5 * (strength * weights.square().sum(dim=(1, 2))).double()
        regularised = weight_gradient.view_as(weights) / count + strength[:, None, None] * weights
        bias_part = bias_gradient.view(len(chosen), -1, 1) / count
        all_losses = torch.zeros(len(point), dtype=torch.float64, device=point.device)
        all_gradients = torch.zeros_like(point)
        all_losses[chosen] = loss
        all_gradients[chosen] = torch.cat([regularised, bias_part], dim=2).flatten(1)
        return all_losses, all_gradients


class _CurvatureMemory:
    """The last `history` pairs (step, change of gradient) of every problem."""

    def __init__(self, history: int, inverse_curvature: Float[Tensor, "p e"]) -> None:
        self.history = history
        self.inverse_curvature = inverse_curvature
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # s [p, e], y [p, e], 1 / (s.y) [p]
        self.scale = torch.ones_like(inverse_curvature[:, 0])

    def add(self, step: Tensor, change: Tensor) -> None:
        """Append one pair a problem; a pair without positive curvature is kept inert (1 / (s.y) = 0)."""
        curvature = (step * change).sum(dim=1)
        expected = (change.square() * self.inverse_curvature).sum(dim=1)
        valid = curvature > torch.finfo(step.dtype).eps * expected
        inverse = torch.where(valid, 1 / torch.where(valid, curvature, 1.0), 0.0)
        self.scale = torch.where(valid, curvature / torch.where(valid, expected, 1.0), self.scale)
        self.pairs = [*self.pairs[-self.history + 1 :], (step, change, inverse)]

    def direction(self, gradient: Tensor) -> Tensor:
        """-H g by the two-loop recursion."""
        result = gradient.clone()
        weights = []
        for step, change, inverse in reversed(self.pairs):
            weight = inverse * (step * result).sum(dim=1)
            result -= weight[:, None] * change
            weights.append(weight)
        result *= self.scale[:, None] * self.inverse_curvature
        for (step, change, inverse), weight in zip(self.pairs, reversed(weights), strict=True):
            correction = weight - inverse * (change * result).sum(dim=1)
            result += correction[:, None] * step
        return -result


def _backtrack(
    problem: _Objective,
    point: Tensor,
    direction: Tensor,
    gradient: Tensor,
    loss: Tensor,
    active: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Halve each problem's step from 1 until Armijo's condition holds; a step of 0 where it never did."""
    slope = (direction * gradient).sum(dim=1)
    step = torch.zeros_like(slope)
    new_loss, new_gradient = torch.zeros_like(loss), torch.zeros_like(point)
    # Near the solution the decrease falls below the rounding of the loss: within it, a step counts as one.
    slack = torch.finfo(point.dtype).eps * loss.abs()
    pending, trial = active, torch.ones_like(slope)
    for _ in range(MAX_HALVINGS):
        trial_loss, trial_gradient = problem(point + trial[:, None] * direction, pending)
        accepted = trial_loss <= loss + ARMIJO * (trial * slope).double() + slack
        done = pending[accepted[pending]]
        step[done] = trial[done]
        new_loss[done], new_gradient[done] = trial_loss[done], trial_gradient[done]
        pending = pending[~accepted[pending]]
        if len(pending) == 0:
            break
        trial[pending] *= 0.5
    return step, new_loss, new_gradient
