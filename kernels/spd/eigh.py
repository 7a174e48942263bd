"""Logarithm, distance and gradient by eigendecomposition, with the Loewner matrix of the logarithm."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from kernels.spd.device import fused

JACOBI_LIMIT = 64
"""Largest n whose eigendecomposition, logarithm and gradient are one launch."""

logger = logging.getLogger(__name__)


@functools.cache
def _warn_if_torch_loops(version: str) -> None:
    major, minor = (int(part) for part in version.split("+")[0].split(".")[:2])
    if (major, minor) <= (2, 11):  # github.com/pytorch/pytorch/issues/174674
        logger.warning(
            "torch %s solves CUDA matrices above n = 32 one by one: install torch >= 2.12, or use backend='resolvent'",
            version,
        )


def batched_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [b, n] ascending and vectors [b, n, n] of symmetric fp32 or fp64 matrices on any device.

    Raises torch.linalg.LinAlgError where LAPACK does. On CUDA the host waits.
    """
    if matrices.device.type == "cuda":
        _warn_if_torch_loops(torch.__version__)
    values, vectors = torch.linalg.eigh(matrices)
    return values, vectors


def loewner_matrix(eigenvalues: Tensor) -> Tensor:
    """Divided differences of the logarithm, [b, n] -> [b, n, n]: log1p(x) / (x low), x = (high - low) / low.

    This form has no cancellation: it is exact at repeated eigenvalues, where (log a - log b) / (a - b) is 0/0
    and autograd through an eigendecomposition gives NaN.
    """
    low = torch.minimum(eigenvalues[:, :, None], eigenvalues[:, None, :])
    x = (eigenvalues[:, :, None] - eigenvalues[:, None, :]).abs() / low
    return torch.where(x > 0, torch.log1p(x) / torch.where(x > 0, x, 1.0), 1.0) / low


def _decompose(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [b, n] and vectors [b, n, n]; NaN for a matrix with a NaN or Inf, without an exception.

    LAPACK raises on NaN, and an exception inside compiled code would end one rank and hang the others. A NaN
    loss is seen by the trainer's check on the loss before the optimizer takes its step.
    """
    finite = torch.isfinite(matrices).all(dim=-1).all(dim=-1)
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    safe = torch.where(finite[:, None, None], matrices, identity)
    try:
        eigenvalues, vectors = batched_eigh(safe)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        logger.error("eigh of %s finite matrices failed (%s); their loss is NaN", list(matrices.shape), error)
        return torch.full_like(matrices[:, 0], torch.nan), torch.full_like(matrices, torch.nan)
    return torch.where(finite[:, None], eigenvalues, torch.nan), vectors


def eigh_logm(matrices: Tensor) -> Tensor:
    """Matrix logarithm, [b, n, n] -> [b, n, n]."""
    if fused(matrices, JACOBI_LIMIT):
        from kernels.spd.triton_jacobi import jacobi

        return jacobi(matrices, None, "log")[1]
    eigenvalues, vectors = _decompose(matrices)
    if fused(matrices):
        from kernels.spd.triton_spectral import log_map

        return log_map(eigenvalues, vectors, None, write=True)[1]
    return _log_map(eigenvalues, vectors)


def eigh_logm_backward(matrices: Tensor, grad: Tensor) -> Tensor:
    """Gradient in A of sum(grad * log A), all [b, n, n]."""
    symmetric = 0.5 * (grad + grad.mT)
    if fused(matrices, JACOBI_LIMIT):
        from kernels.spd.triton_jacobi import jacobi

        return jacobi(matrices, symmetric, "pullback")[1]
    eigenvalues, vectors = _decompose(matrices)
    if fused(matrices):
        from kernels.spd.triton_spectral import spectral_gradient

        return spectral_gradient(eigenvalues, vectors, symmetric)
    return _spectral_gradient(eigenvalues, vectors, symmetric)


def eigh_loss(matrices: Tensor, target: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
    """||log A - T||_F^2 of each matrix, [b], and its gradient in A, [b, n, n] (or [0] if not wanted)."""
    if fused(matrices, JACOBI_LIMIT):
        from kernels.spd.triton_jacobi import jacobi

        return jacobi(matrices, target, "loss_and_gradient" if with_grad else "loss")
    eigenvalues, vectors = _decompose(matrices)
    if fused(matrices):
        from kernels.spd.triton_spectral import log_map, spectral_gradient

        distance, upstream = log_map(eigenvalues, vectors, target, write=with_grad)
        if not with_grad:
            return distance, upstream
        return distance, spectral_gradient(eigenvalues, vectors, upstream)
    return plain_eigh_loss(eigenvalues, vectors, target, with_grad)


def plain_eigh_loss(eigenvalues: Tensor, vectors: Tensor, target: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
    """The same by torch's own products, on any device and in fp64."""
    difference = _log_map(eigenvalues, vectors) - target
    distance = difference.square().sum(dim=(-2, -1))
    if not with_grad:
        return distance, vectors.new_empty(0)
    return distance, _spectral_gradient(eigenvalues, vectors, 2 * difference)


def _log_map(eigenvalues: Tensor, vectors: Tensor) -> Tensor:
    return (vectors * eigenvalues.log()[:, None, :]) @ vectors.mT


def _spectral_gradient(eigenvalues: Tensor, vectors: Tensor, upstream: Tensor) -> Tensor:
    """U (Phi o (U^T G U)) U^T for symmetric G."""
    # Daleckii and Krein: in the eigenbasis the derivative of the logarithm is a product entry by entry.
    inner = vectors.mT @ upstream @ vectors
    return vectors @ (inner * loewner_matrix(eigenvalues)) @ vectors.mT
