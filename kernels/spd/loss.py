"""The public functions, matrix logarithm and log-Euclidean loss, as torch custom ops: opaque to the compiler,
differentiable once, right under autocast."""

import functools
import logging
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.spd.device import full_fp32
from kernels.spd.eigh import JACOBI_LIMIT, eigh_logm, eigh_logm_backward, eigh_loss
from kernels.spd.matrices import MAX_TOKENS, check_eps, token_spd
from kernels.spd.resolvent import resolvent_logm, resolvent_logm_backward, resolvent_loss

# No `from __future__ import annotations` here: torch reads the schemas from the annotations.

logger = logging.getLogger(__name__)

Backend = Literal["auto", "eigh", "resolvent"]
BACKENDS = ("auto", "eigh", "resolvent")


def resolve(backend: str, matrices: Tensor) -> str:
    """ "eigh" or "resolvent" for [b, n, n] matrices: a function of backend, device type, n and dtype only.

    So the teacher's logarithm and the student's loss agree whenever they were given the same backend.
    """
    return _resolve(backend, matrices.device.type, matrices.shape[-1], matrices.dtype == torch.float64)


@functools.cache
def _resolve(backend: str, device: str, n: int, double: bool) -> str:
    name = backend
    if backend == "auto":
        # Measured on CPUs, where the resolvent takes 1.0 to 1.9 times as long; chosen, not measured, on GPUs: one
        # launch up to JACOBI_LIMIT, above it the path on which the host does not wait.
        between = JACOBI_LIMIT < n <= MAX_TOKENS
        name = "resolvent" if device == "cuda" and between and not double else "eigh"
    logger.info("SPD logarithm of %d x %d matrices on %s: %s (asked for: %s)", n, n, device, name, backend)
    return name


@torch.library.custom_op("firn_spd::logm", mutates_args=())
def logm_op(matrices: Tensor, eps: float, backend: str) -> Tensor:
    """Matrix logarithm [b, n, n], fp32 or fp64."""
    name = resolve(backend, matrices)
    with full_fp32(matrices.device):
        log = eigh_logm(matrices) if name == "eigh" else resolvent_logm(matrices, eps)
    return log.contiguous()  # what the compiler was told; products of column-major vectors are not


@logm_op.register_fake
def _(matrices: Tensor, eps: float, backend: str) -> Tensor:
    return matrices.new_empty(matrices.shape)


@torch.library.custom_op("firn_spd::logm_backward", mutates_args=())
def logm_backward_op(matrices: Tensor, grad: Tensor, eps: float, backend: str) -> Tensor:
    """Gradient of sum(grad * log A) in A. It factorises again: the forward pass keeps nothing but A."""
    name = resolve(backend, matrices)
    with full_fp32(matrices.device):
        if name == "eigh":
            return eigh_logm_backward(matrices, grad).contiguous()
        return resolvent_logm_backward(matrices, grad, eps).contiguous()


@logm_backward_op.register_fake
def _(matrices: Tensor, grad: Tensor, eps: float, backend: str) -> Tensor:
    return matrices.new_empty(matrices.shape)


@torch.library.custom_op("firn_spd::log_loss", mutates_args=())
def log_loss_op(matrices: Tensor, target: Tensor, eps: float, backend: str, with_grad: bool) -> tuple[Tensor, Tensor]:
    """||log A - T||_F^2 [b] and, in the same pass, its gradient in A [b, n, n] ([0] without `with_grad`)."""
    name = resolve(backend, matrices)
    with full_fp32(matrices.device):
        if name == "eigh":
            distance, gradient = eigh_loss(matrices, target, with_grad)
        else:
            distance, gradient = resolvent_loss(matrices, target, eps, with_grad)
    return distance.contiguous(), gradient.contiguous()


@log_loss_op.register_fake
def _(matrices: Tensor, target: Tensor, eps: float, backend: str, with_grad: bool) -> tuple[Tensor, Tensor]:
    grad_shape = matrices.shape if with_grad else (0,)
    return matrices.new_empty(matrices.shape[0]), matrices.new_empty(grad_shape)


def _logm_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    matrices, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(matrices)


def _logm_backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
    (matrices,) = ctx.saved_tensors
    return logm_backward_op(matrices, grad, ctx.eps, ctx.backend), None, None


@torch.library.custom_op("firn_spd::only_once", mutates_args=())
def only_once_op(grad_loss: Tensor, matrices: Tensor) -> Tensor:
    """A copy of `grad_loss` that depends on the matrices, so that a second derivative is an error, not wrong."""
    return grad_loss.clone()


@only_once_op.register_fake
def _(grad_loss: Tensor, matrices: Tensor) -> Tensor:
    return torch.empty_like(grad_loss)


def _loss_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], output[1])


def _loss_backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
    matrices, gradient = ctx.saved_tensors
    return only_once_op(grad_loss, matrices)[:, None, None] * gradient, None, None, None, None


def _refuse_second_derivative(ctx, *_):  # type: ignore[no-untyped-def]
    raise RuntimeError(
        "firn_spd: the logarithm and the loss are differentiable once, and a second derivative was asked for. "
        "Call backward without create_graph."
    )


logm_op.register_autograd(_logm_backward, setup_context=_logm_setup)
log_loss_op.register_autograd(_loss_backward, setup_context=_loss_setup)
logm_backward_op.register_autograd(_refuse_second_derivative)
only_once_op.register_autograd(_refuse_second_derivative)


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
    check_eps(eps)
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
