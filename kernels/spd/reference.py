"""The definition in float64, one matrix at a time: what every other path is tested against."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def reference_token_spd(tokens: Tensor, eps: float = 1.0) -> Tensor:
    """tokens [b, n, d] of any float dtype -> float64 [b, n, n]: cosines of all pairs, plus eps I."""
    matrices = []
    for crop in tokens.double():
        unit = torch.stack([token / token.norm() for token in crop])
        cosines = torch.stack([torch.stack([(a * b).sum() for b in unit]) for a in unit])
        matrices.append(cosines + eps * torch.eye(len(unit), dtype=torch.float64))
    return torch.stack(matrices)


def reference_logm(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Matrix logarithm of one symmetric positive definite matrix: U diag(log lambda) U^T, float64."""
    eigenvalues, vectors = torch.linalg.eigh(matrix.detach().double().cpu())
    return vectors @ torch.diag(eigenvalues.log()) @ vectors.T


def log_divided_difference(a: float, b: float) -> float:
    """(log a - log b) / (a - b), and its limit 1 / a for a = b; without cancellation."""
    low, high = min(a, b), max(a, b)
    x = (high - low) / low
    return (math.log1p(x) / x if x > 0 else 1.0) / low


def reference_loss_and_gradient(
    matrix: Float[Tensor, "n n"], target: Float[Tensor, "n n"]
) -> tuple[float, Float[Tensor, "n n"]]:
    """||log A - T||_F^2 / n of one matrix, and its gradient in A by the theorem of Daleckii and Krein.

    With A = U diag(lambda) U^T and E = log A - T the gradient is (2 / n) U (Phi o (U^T E U)) U^T, where
    Phi_ij is the divided difference of the logarithm at (lambda_i, lambda_j).
    """
    n = matrix.shape[0]
    eigenvalues, vectors = torch.linalg.eigh(matrix.detach().double().cpu())
    difference = vectors @ torch.diag(eigenvalues.log()) @ vectors.T - target.detach().double().cpu()
    values = [float(value) for value in eigenvalues]
    loewner = torch.tensor([[log_divided_difference(a, b) for b in values] for a in values], dtype=torch.float64)
    gradient = 2 / n * vectors @ (loewner * (vectors.T @ difference @ vectors)) @ vectors.T
    return float(difference.square().sum()) / n, gradient
