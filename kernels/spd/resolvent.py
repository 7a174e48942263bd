"""Logarithm, distance and gradient by a sum of shifted inverses: no eigenvalues, no convergence loop.

f(A) = c I - sum_j rho_j R_j with R_j = (A + t_j I)^-1, and for symmetric G the gradient of <G, f(A)> in A is
sum_j rho_j R_j G R_j. The inverses come from the Triton kernel where it runs, else from batched Cholesky
factors.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from kernels.spd.device import MIN_CAPABILITY, fused
from kernels.spd.matrices import MAX_TOKENS
from kernels.spd.poles import RationalLog, rational_log

logger = logging.getLogger(__name__)


def _fused(matrices: Tensor) -> bool:
    """Whether the Triton kernel takes these matrices; on CUDA it is said once if not."""
    fits = fused(matrices, MAX_TOKENS)
    if not fits and matrices.device.type != "cpu":
        _say_fallback(str(matrices.dtype), matrices.shape[-1])
    return fits


@functools.cache
def _say_fallback(dtype: str, n: int) -> None:
    logger.warning(
        "SPD resolvent of %s %d x %d matrices by batched Cholesky factors: the fused kernel needs fp32, n <= %d, "
        "Triton and compute capability %s",
        dtype,
        n,
        n,
        MAX_TOKENS,
        MIN_CAPABILITY,
    )


def resolvent_logm(matrices: Tensor, eps: float) -> Tensor:
    """f(A), [b, n, n] -> [b, n, n]."""
    rational = rational_log(eps, matrices.shape[-1])
    if _fused(matrices):
        from kernels.spd import triton_resolvent

        return triton_resolvent.resolvent_logm(matrices, rational)
    return _weighted_log(scaled_resolvents(matrices, rational), rational)


def resolvent_logm_backward(matrices: Tensor, grad: Tensor, eps: float) -> Tensor:
    """Gradient in A of sum(grad * f(A)), all [b, n, n]."""
    rational = rational_log(eps, matrices.shape[-1])
    symmetric = 0.5 * (grad + grad.mT)
    if _fused(matrices):
        from kernels.spd import triton_resolvent

        return triton_resolvent.resolvent_logm_backward(matrices, symmetric, rational)
    return _pullback(scaled_resolvents(matrices, rational), symmetric)


def resolvent_loss(matrices: Tensor, target: Tensor, eps: float, with_grad: bool) -> tuple[Tensor, Tensor]:
    """||f(A) - T||_F^2 of each matrix, [b], and its gradient in A, [b, n, n] (or [0] if not wanted)."""
    rational = rational_log(eps, matrices.shape[-1])
    if _fused(matrices):
        from kernels.spd import triton_resolvent

        return triton_resolvent.resolvent_loss(matrices, target, rational, with_grad)
    return cholesky_loss(matrices, target, rational, with_grad)


def cholesky_loss(matrices: Tensor, target: Tensor, rational: RationalLog, with_grad: bool) -> tuple[Tensor, Tensor]:
    """The loss by batched Cholesky factors, on any device."""
    inverses = scaled_resolvents(matrices, rational)
    difference = _weighted_log(inverses, rational) - target
    distance = difference.square().sum(dim=(-2, -1))
    if not with_grad:
        return distance, matrices.new_empty(0)
    return distance, _pullback(inverses, 2 * difference)


def scaled_resolvents(matrices: Tensor, rational: RationalLog) -> Tensor:
    """sqrt(rho_j) (A + t_j I)^-1, [b, poles, n, n]; NaN for a matrix that is not positive definite.

    The square root makes the gradient sum_j R'_j G R'_j: two products of one operand, no scaling between.
    Shifts and residues enter as host numbers, so nothing is copied to the device and the host does not wait.
    """
    n = matrices.shape[-1]
    shifted = matrices[:, None].repeat(1, len(rational.poles), 1, 1)
    diagonals = shifted.diagonal(dim1=-2, dim2=-1)
    for j, pole in enumerate(rational.poles):
        diagonals[:, j] += pole
    factors, info = torch.linalg.cholesky_ex(shifted)
    failed = (info != 0)[..., None, None]
    identity = torch.eye(n, dtype=matrices.dtype, device=matrices.device)
    # What failed is solved as the identity and marked below: no exception, no wait for the host.
    factors = torch.where(failed, identity, factors)
    # torch's batched cholesky_inverse is a host loop on CUDA; a triangular solve is not.
    on_cpu = matrices.device.type == "cpu"
    inverses = torch.cholesky_inverse(factors) if on_cpu else inverse_by_solve(factors)
    for j, residue in enumerate(rational.residues):
        inverses[:, j] *= residue**0.5
    return inverses.masked_fill_(failed, torch.nan)


def inverse_by_solve(factors: Tensor) -> Tensor:
    """(L L^T)^-1 = L^-T L^-1 from lower Cholesky factors [..., n, n]."""
    identity = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)
    halves = torch.linalg.solve_triangular(factors, identity.expand_as(factors), upper=False)
    return halves.mT @ halves


def _weighted_log(inverses: Tensor, rational: RationalLog) -> Tensor:
    """c I - sum_j sqrt(rho_j) R'_j."""
    result = torch.zeros_like(inverses[:, 0])
    for j, residue in enumerate(rational.residues):
        result.sub_(inverses[:, j], alpha=residue**0.5)
    result.diagonal(dim1=-2, dim2=-1).add_(rational.constant)
    return result


def _pullback(inverses: Tensor, upstream: Tensor) -> Tensor:
    """sum_j R'_j G R'_j for symmetric G, by two products.

    With the inverses side by side, H = [R'_1 ... R'_J], row (i, j) of H seen as [n J, n] is row i of R'_j. So
    H G is [R'_1 G ... R'_J G] without a copy, and its product with H^T, the inverses stacked, is the sum.
    """
    batch, num_poles, n, _ = inverses.shape
    side_by_side = inverses.transpose(1, 2).reshape(batch, n * num_poles, n)
    products = (side_by_side @ upstream).view(batch, n, num_poles * n)
    return products @ side_by_side.view(batch, n, num_poles * n).mT
