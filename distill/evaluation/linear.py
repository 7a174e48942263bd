"""Linear probe: logistic regression on frozen features, its strength chosen on a held-out part of train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from common.errors import UserError
from distill.evaluation.features import Features, FeatureSet
from distill.evaluation.logistic import LinearFits, SgdProtocol, fit_logistic, fit_sgd


@dataclass(frozen=True)
class LbfgsProtocol:
    """Logistic regression by L-BFGS on standardised features.

    Attributes:
        regularisations: lambda of mean cross-entropy + lambda / 2 ||W||^2.
        tolerance: share of the objective by which it may be above its optimum.
        max_iterations: limit of L-BFGS iterations.
    """

    regularisations: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    tolerance: float = 1e-2
    max_iterations: int = 1000

    def __post_init__(self) -> None:
        if not self.regularisations or min(self.regularisations) <= 0:
            raise UserError(
                f"--regularisations {self.regularisations}: each must be above 0, and there must be one. "
                "Without any, separable classes have no solution. Use for instance 1e-6."
            )


@dataclass(frozen=True)
class LinearProtocol:
    """How the linear classifier is fitted and chosen.

    Attributes:
        solver: "lbfgs" or "sgd".
        held_out: share of train that chooses lambda, learning rate and feature set.
        seed: of the held-out split, and of SGD's initialisation and order.
        lbfgs: settings of that solver.
        sgd: settings of that solver.
    """

    solver: str = "lbfgs"
    held_out: float = 0.1
    seed: int = 0
    lbfgs: LbfgsProtocol = field(default_factory=LbfgsProtocol)
    sgd: SgdProtocol = field(default_factory=SgdProtocol)


@dataclass(frozen=True)
class LinearResult:
    """One feature set's linear accuracy.

    Attributes:
        features: name of the feature set.
        top1: percent on val, of the classifier fitted on all of train.
        held_out_top1: percent on the held-out part, of the classifier that was chosen there.
        setting: the chosen lambda or base learning rate.
        at_grid_edge: the choice is the smallest or the largest offered and better than the one next to it:
            the best may lie outside.
        unconverged: how many of the fits, the last one included, stopped short of the optimum (L-BFGS).
    """

    features: str
    top1: float
    held_out_top1: float
    setting: float
    at_grid_edge: bool
    unconverged: int


def linear_probe(
    train: Features, val: Features, *, sets: Sequence[FeatureSet], protocol: LinearProtocol, device: torch.device | str
) -> list[LinearResult]:
    """Fit and score each feature set; the one to report is `best_result`.

    The classifier of each lambda (or learning rate) is fitted on train less the held-out part, the best one
    on the held-out part is chosen (the strongest lambda, or the smallest rate, of equals), fitted again on
    all of train and scored once on val. Val takes no part in any choice. Classes are those of train; a val
    image of another class counts as an error.

    Args:
        train: features to fit on, every row labelled.
        val: features to score, every row labelled.
        sets: feature sets, each fitted by itself.
        protocol: solver, grid and split.
        device: where the arithmetic runs, in fp32.

    Raises:
        UserError: unknown solver, no feature set, an unlabelled row, one class only, or too few rows to
            split.
    """
    if protocol.solver not in ("lbfgs", "sgd"):
        raise UserError(f"linear probe: solver {protocol.solver!r} is not known. Choose lbfgs or sgd (--protocol).")
    if not sets:
        raise UserError(
            "linear probe: no feature set to fit; the model has fewer blocks than every value of --layers. "
            "Add 1 to --layers."
        )
    classes = train.labels.unique()
    if len(classes) < 2 or int(classes.min()) < 0 or len(val.labels) == 0 or int(val.labels.min()) < 0:
        raise UserError(
            f"linear probe: {len(classes)} classes in train, {int((train.labels < 0).sum())} train and "
            f"{int((val.labels < 0).sum())} of {len(val.labels)} val rows without one. It needs two classes "
            "or more and a class for every row. Leave unlabelled rows out."
        )
    fit_rows, held_rows = held_out_split(train.labels.numpy(), fraction=protocol.held_out, seed=protocol.seed)
    # Held-out rows go last, so that fitting and held-out parts are views of one matrix, not copies of it.
    order = torch.cat([torch.from_numpy(fit_rows), torch.from_numpy(held_rows)])
    labels = torch.searchsorted(classes, train.labels[order])  # 0 .. c - 1
    return [
        _choose_and_score(
            feature_set.name,
            protocol,
            classes.to(device),
            train=feature_set.of(train)[order].to(device),
            labels=labels.to(device),
            num_fit=len(fit_rows),
            val=feature_set.of(val).to(device),
            val_labels=val.labels.to(device),
        )
        for feature_set in sets
    ]


def best_result(results: Sequence[LinearResult]) -> LinearResult:
    """The result to report: the first of those best on the held-out part, never the best on val."""
    return max(results, key=lambda result: result.held_out_top1)


def _choose_and_score(
    name: str,
    protocol: LinearProtocol,
    classes: Int64[Tensor, " c"],
    *,
    train: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    num_fit: int,
    val: Float[Tensor, "m d"],
    val_labels: Int64[Tensor, " m"],
) -> LinearResult:
    # Of equal accuracies on the held-out part the first is taken: the strongest lambda, the smallest rate.
    if protocol.solver == "lbfgs":
        grid = sorted(protocol.lbfgs.regularisations, reverse=True)
        mean, scale = standardisation(train[:num_fit])
        train.sub_(mean).mul_(scale)  # in place: the largest matrix of the probe
        val = (val - mean) * scale
    else:
        grid = sorted(protocol.sgd.learning_rates)

    def fit(rows: int, settings: list[float], start: tuple[Tensor, Tensor] | None = None) -> LinearFits:
        if protocol.solver == "sgd":
            sgd = replace(protocol.sgd, learning_rates=tuple(settings))
            return fit_sgd(train[:rows], labels[:rows], num_classes=len(classes), protocol=sgd, seed=protocol.seed)
        return fit_logistic(
            train[:rows],
            labels[:rows],
            num_classes=len(classes),
            regularisations=settings,
            tolerance=protocol.lbfgs.tolerance,
            max_iterations=protocol.lbfgs.max_iterations,
            start=start,
        )

    fits = fit(num_fit, grid)
    correct = fits.predict(train[num_fit:]) == labels[num_fit:]
    held_out = 100 * correct.double().mean(dim=1)  # [p]
    chosen = int(held_out.argmax())
    final = fit(len(train), [grid[chosen]], (fits.weight[chosen], fits.bias[chosen]))
    return LinearResult(
        features=name,
        top1=100 * (classes[final.predict(val)[0]] == val_labels).double().mean().item(),
        held_out_top1=held_out[chosen].item(),
        setting=grid[chosen],
        at_grid_edge=_at_edge(held_out, chosen),
        unconverged=int((~fits.converged).sum()) + int((~final.converged).sum()),
    )


def _at_edge(held_out: Float[Tensor, " p"], chosen: int) -> bool:
    """Whether accuracy still rises towards the end of the grid where the choice lies."""
    if len(held_out) == 1 or 0 < chosen < len(held_out) - 1:
        return False
    neighbour = 1 if chosen == 0 else chosen - 1
    return bool(held_out[chosen] > held_out[neighbour])


def standardisation(features: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Mean and 1 / standard deviation of each channel; a constant channel is scaled by 1.

    Every model gets the same grid of lambdas, whatever the scale of its features, and L-BFGS is well
    conditioned.
    """
    variance, mean = torch.var_mean(features, dim=0, correction=0)
    tiny = torch.finfo(features.dtype).eps * variance.max()
    return mean, torch.where(variance > tiny, variance.clamp_min(tiny), 1.0).rsqrt()


def held_out_split(
    labels: npt.NDArray[np.integer], *, fraction: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Hold out `fraction` of the rows, each class in proportion.

    Rows are shuffled with the seed and sorted by class; evenly spaced places of that list are held out, so a
    class of c rows gives floor or ceil of c * fraction. A class of one row is never held out.

    Args:
        labels: class of each row [n], 0 or above.
        fraction: share to hold out, above 0 and at most 0.5.
        seed: decides which rows.

    Returns:
        (positions to fit on, positions held out), ascending int64; disjoint, together all rows.

    Raises:
        UserError: the fraction is out of range, a label is negative, or nothing would be held out.
    """
    if not 0 < fraction <= 0.5:
        raise UserError(f"held-out split: fraction {fraction}. It must be above 0 and at most 0.5.")
    labels = np.asarray(labels)
    if len(labels) and labels.min() < 0:
        raise UserError(
            f"held-out split: {int((labels < 0).sum())} of {len(labels)} rows have no class. "
            "A stratified split needs one. Leave unlabelled rows out."
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels) if len(labels) else np.zeros(0, dtype=np.int64)
    candidates = by_class[counts[labels[by_class]] > 1]
    take = round(len(candidates) * fraction)
    if take == 0:
        raise UserError(
            f"held-out split: {len(labels)} rows, of which {len(candidates)} are in a class of two or more, "
            f"leave none to hold out at a fraction of {fraction}. Give more labelled images a class."
        )
    places = ((np.arange(take) + 0.5) * len(candidates) / take).astype(np.int64)
    held = np.sort(candidates[places])
    keep = np.ones(len(labels), dtype=bool)
    keep[held] = False
    return np.flatnonzero(keep), held


def subset_rows(num_rows: int, *, limit: int | None, seed: int) -> npt.NDArray[np.int64]:
    """Row numbers 0..num_rows-1, or a seeded sample of `limit` of them, ascending."""
    if limit is None or limit >= num_rows:
        return np.arange(num_rows)
    if limit < 1:
        raise UserError(f"row limit {limit}: at least one row is needed. Give a positive number, or none.")
    return np.sort(np.random.default_rng(seed).choice(num_rows, size=limit, replace=False))
