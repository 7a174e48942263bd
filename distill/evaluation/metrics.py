"""Label-free measures of features: effective rank, and agreement with the teacher through a linear map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from common.errors import UserError

RANKME_MAX_ROWS = 25_600


def rankme(features: Float[Tensor, "n d"], *, max_rows: int = RANKME_MAX_ROWS) -> float:
    """Effective rank: exp of the entropy of the normalised singular values (Garrido et al. 2023, RankMe).

    Args:
        features: [n, d], uncentred, as the paper has it; fp64 inside.
        max_rows: evenly spaced rows that are used of a longer matrix (25,600 in the paper).

    Returns:
        From 1 (one direction) to min(n, d) (all directions alike).
    """
    if len(features) > max_rows:
        features = features[torch.linspace(0, len(features) - 1, max_rows, device=features.device).long()]
    singular = torch.linalg.svdvals(features.double())
    share = singular / singular.sum()
    entropy = torch.special.entr(share).sum()
    return entropy.exp().item()


@dataclass(frozen=True)
class LinearMap:
    """x -> (x - source_mean) @ weight, the best estimate of target - target_mean.

    Attributes:
        weight: fp32 [d, e].
        source_mean: fp32 [d].
        target_mean: fp32 [e].
    """

    weight: Float[Tensor, "d e"]
    source_mean: Float[Tensor, " d"]
    target_mean: Float[Tensor, " e"]

    def centred(self, source: Float[Tensor, "*n d"]) -> Float[Tensor, "*n e"]:
        """Estimate of the target less its mean."""
        return (source - self.source_mean) @ self.weight

    def __call__(self, source: Float[Tensor, "*n d"]) -> Float[Tensor, "*n e"]:
        """Estimate of the target."""
        return self.centred(source) + self.target_mean


def fit_linear_map(source: Float[Tensor, "n d"], target: Float[Tensor, "n e"], *, ridge: float = 1e-3) -> LinearMap:
    """Ridge regression from one model's features to another's.

    Args:
        source: [n, d].
        target: [n, e], same rows.
        ridge: penalty, in units of the mean eigenvalue of the source's covariance.
    """
    if len(source) != len(target) or len(source) < 2:
        raise UserError(
            f"linear map: {len(source)} source and {len(target)} target rows. Both need the same rows, two "
            "at least. Extract both models over the same images."
        )
    source_mean, target_mean = source.double().mean(dim=0), target.double().mean(dim=0)
    centred = source.double() - source_mean
    covariance = centred.T @ centred / len(source)
    cross = centred.T @ (target.double() - target_mean) / len(source)
    penalty = (ridge * covariance.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny)
    identity = torch.eye(len(covariance), dtype=torch.float64, device=source.device)
    weight = torch.linalg.solve(covariance + penalty * identity, cross)
    return LinearMap(weight.float(), source_mean.float(), target_mean.float())


def cosine_to_teacher(
    student_train: Float[Tensor, "n d"],
    teacher_train: Float[Tensor, "n e"],
    student_val: Float[Tensor, "m d"],
    teacher_val: Float[Tensor, "m e"],
    *,
    ridge: float = 1e-3,
) -> float:
    """Mean cosine on val between the teacher's features and the student's, mapped linearly onto them.

    The map is fitted on train, the same way for every model, so a student needs no projection head to be
    compared. Both sides are centred by the teacher's train mean: an uncentred cosine is mostly the mean that
    all images share, and a random network scores high on it.
    """
    mapping = fit_linear_map(student_train, teacher_train, ridge=ridge)
    estimate = mapping.centred(student_val.float())
    truth = teacher_val.float() - mapping.target_mean
    return F.cosine_similarity(estimate, truth, dim=1).double().mean().item()
