"""Label-free views of features: effective rank, agreement with the teacher, colours by its principal components."""

from __future__ import annotations

from collections.abc import Mapping
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


# The range that colours span: outliers beyond it saturate, so that one patch does not grey the rest.
LOW, HIGH = 0.02, 0.98


@dataclass(frozen=True)
class PatchBasis:
    """Three principal components of the teacher's patch tokens, and their range.

    Attributes:
        mean: [d].
        components: unit rows, the strongest first, signs fixed, [3, d].
        low: score that becomes 0 in each channel, [3].
        high: score that becomes 1, [3].
    """

    mean: Float[Tensor, " d"]
    components: Float[Tensor, "3 d"]
    low: Float[Tensor, " 3"]
    high: Float[Tensor, " 3"]

    def scores(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n 3"]:
        """Coordinates in the basis."""
        return (tokens.float() - self.mean) @ self.components.T

    def colours(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n 3"]:
        """RGB in 0..1."""
        return ((self.scores(tokens) - self.low) / (self.high - self.low)).clamp(0, 1)


def fit_patch_basis(teacher_tokens: Float[Tensor, "b n d"]) -> PatchBasis:
    """Principal components of teacher patch tokens, with the same signs on every machine and run.

    A component's sign is that which makes its largest entry (by absolute value) positive.

    Args:
        teacher_tokens: patch tokens of some images; at least four tokens.

    Raises:
        UserError: fewer tokens or channels than three components need.
    """
    tokens = teacher_tokens.flatten(0, 1).double()
    if min(len(tokens) - 1, tokens.shape[1]) < 3:
        raise UserError(
            f"PCA: {len(tokens)} patch tokens of dimension {tokens.shape[1]}. Three components need four "
            "tokens and three dimensions. Give more images."
        )
    mean = tokens.mean(dim=0)
    centred = tokens - mean
    # The covariance is d x d whatever the number of tokens; eigenvalues ascend.
    components = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].T.flip(0)
    largest = components.abs().argmax(dim=1, keepdim=True)
    components = components * components.gather(1, largest).sign()
    scores = centred @ components.T
    low, high = (quantile(scores, share) for share in (LOW, HIGH))
    high = torch.maximum(high, low + torch.finfo(torch.float32).eps)
    return PatchBasis(mean.float(), components.float(), low.float(), high.float())


def quantile(scores: Float[Tensor, "n 3"], share: float) -> Float[Tensor, " 3"]:
    """The value below which `share` of each column lies, without torch.quantile's limit on the size."""
    ordered = scores.sort(dim=0).values
    return ordered[round(share * (len(ordered) - 1))]


def map_to_teacher(
    student_fit: Float[Tensor, "b n d"],
    teacher_fit: Float[Tensor, "b n e"],
    student_tokens: Float[Tensor, "m n d"],
    *,
    ridge: float = 1e-3,
) -> Float[Tensor, "m n e"]:
    """Student patch tokens in the teacher's space, by a ridge map fitted on other images.

    Fitted on images other than those shown: a map with more coefficients than tokens would paint the
    teacher's picture from any features. Both models need the same patch grid.
    """
    if student_fit.shape[:2] != teacher_fit.shape[:2]:
        raise UserError(
            f"PCA: the student has {student_fit.shape[1]} patches an image, the teacher "
            f"{teacher_fit.shape[1]}. One basis needs one grid. Compare models of the same patch size."
        )
    mapping = fit_linear_map(student_fit.flatten(0, 1), teacher_fit.flatten(0, 1), ridge=ridge)
    return mapping(student_tokens)


def paint_patches(
    fit: Mapping[str, Float[Tensor, "b n d"]],
    shown: Mapping[str, Float[Tensor, "m n d"]],
    *,
    teacher: str,
    ridge: float = 1e-3,
) -> tuple[dict[str, Float[Tensor, "m n 3"]], list[str]]:
    """Paint several models' patch tokens in one basis, the teacher's.

    Args:
        fit: patch tokens by model over images that basis and maps are fitted on.
        shown: patch tokens by model over other images, to be painted.
        teacher: the key of the model whose basis it is.
        ridge: of the maps to the teacher; see `fit_linear_map`.

    Returns:
        (RGB in 0..1 by model, the teacher first; models left out because their patch grid is another).
    """
    basis = fit_patch_basis(fit[teacher])
    colours = {teacher: basis.colours(shown[teacher])}
    left_out = []
    for name, tokens in fit.items():
        if name == teacher:
            continue
        if tokens.shape[1] != fit[teacher].shape[1]:
            left_out.append(name)
            continue
        colours[name] = basis.colours(map_to_teacher(tokens, fit[teacher], shown[name], ridge=ridge))
    return colours, left_out
