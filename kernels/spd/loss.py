"""The public functions: matrix logarithm and log-Euclidean loss, by any backend."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.spd.matrices import _check_eps, token_spd
from kernels.spd.ops import log_loss_op, logm_op

Backend = Literal["auto", "eigh", "resolvent"]
BACKENDS = ("auto", "eigh", "resolvent")


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: one of {', '.join(BACKENDS)} is needed, got {backend!r}. Use 'auto'.")


def _check_square(name: str, matrices: Tensor) -> None:
    shape = matrices.shape
    if matrices.dim() != 3 or 0 in shape or shape[1] != shape[2] or not matrices.is_floating_point():
        raise ValueError(
            f"{name}: floating point [batch, n, n] is needed, got {matrices.dtype} {list(shape)}. "
            "Make the matrices with token_spd."
        )


def _at_least_fp32(matrices: Tensor) -> Tensor:
    return matrices if matrices.dtype == torch.float64 else matrices.float()


def spd_logm(
    matrices: Float[Tensor, "b n n"], *, eps: float = 1.0, backend: Backend = "auto"
) -> Float[Tensor, "b n n"]:
    """Matrix logarithm of symmetric positive definite matrices, differentiable once.

    matrices: [b, n, n], the spectrum inside [eps, n + eps] (`token_spd` guarantees it; "resolvent" is
    accurate nowhere else). The result is fp32, or fp64 for fp64. "eigh" diagonalises; "resolvent" uses a
    rational function within `poles.MAX_ERROR` of the logarithm. A matrix with a NaN or Inf gives NaN.
    Raises ValueError for another shape, dtype, eps or backend.
    """
    _check_square("matrices", matrices)
    _check_eps(eps)
    _check_backend(backend)
    with torch.autocast(matrices.device.type, enabled=False):
        return logm_op(_at_least_fp32(matrices), eps, backend)


def log_euclidean_loss(
    student_tokens: Float[Tensor, "b n d"],
    teacher_log: Float[Tensor, "b n n"],
    *,
    eps: float = 1.0,
    backend: Backend = "auto",
    reduction: Literal["mean", "none"] = "mean",
) -> Float[Tensor, ""] | Float[Tensor, " b"]:
    """||log A - T||_F^2 / n of each crop, A = token_spd(student_tokens); the mean over crops, or each.

    student_tokens: [b, n, d], any float dtype; teacher_log: [b, n, n] = spd_logm(token_spd(teacher_tokens))
    with the same eps and backend, so that equal matrices give a loss of zero. The loss is fp32 (fp64 for fp64
    tokens). The gradient goes to the student only and is computed in the forward pass. NaN or Inf in a crop
    gives a NaN loss for it: check the loss before the optimizer's step. The metric is that of Arsigny,
    Fillard, Pennec and Ayache, "Log-Euclidean metrics", 2006. Raises ValueError for shapes, eps, backend or
    reduction that do not fit, and for a teacher that asks for a gradient.
    """
    _check_square("teacher_log", teacher_log)
    _check_backend(backend)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: 'mean' or 'none' is needed, got {reduction!r}. Choose one of the two.")
    if teacher_log.requires_grad:
        raise ValueError(
            "teacher_log: it requires a gradient, and the teacher is frozen in this loss. "
            "Compute it under torch.no_grad() or detach it."
        )
    matrices = token_spd(student_tokens, eps=eps)
    if matrices.shape != teacher_log.shape:
        raise ValueError(
            f"teacher_log: {list(teacher_log.shape)} against student matrices {list(matrices.shape)}. "
            "Give both the same crops and the same token grid (reduce_tokens resamples a larger one)."
        )
    with torch.autocast(matrices.device.type, enabled=False):
        with_grad = torch.is_grad_enabled() and matrices.requires_grad
        distance, _ = log_loss_op(matrices, teacher_log.to(matrices.dtype), eps, backend, with_grad)
        loss = distance / matrices.shape[-1]
        return loss.mean() if reduction == "mean" else loss
