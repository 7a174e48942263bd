"""The SPD operations as torch custom ops: opaque to the compiler, differentiable, right under autocast."""

import torch
from torch import Tensor

from kernels.spd import choice
from kernels.spd.eigh import eigh_logm, eigh_logm_backward, eigh_loss
from kernels.spd.precision import full_fp32
from kernels.spd.resolvent import resolvent_logm, resolvent_logm_backward, resolvent_loss

# No `from __future__ import annotations` here: torch reads the schemas from the annotations.


@torch.library.custom_op("firn_spd::logm", mutates_args=())
def logm_op(matrices: Tensor, eps: float, backend: str) -> Tensor:
    """Matrix logarithm [b, n, n], fp32 or fp64."""
    name = choice.resolve(backend, matrices)
    with full_fp32(matrices.device):
        return eigh_logm(matrices) if name == "eigh" else resolvent_logm(matrices, eps)


@logm_op.register_fake
def _(matrices: Tensor, eps: float, backend: str) -> Tensor:
    return matrices.new_empty(matrices.shape)


@torch.library.custom_op("firn_spd::logm_backward", mutates_args=())
def logm_backward_op(matrices: Tensor, grad: Tensor, eps: float, backend: str) -> Tensor:
    """Gradient of sum(grad * log A) in A. It factorises again: the forward pass keeps nothing but A."""
    name = choice.resolve(backend, matrices)
    with full_fp32(matrices.device):
        if name == "eigh":
            return eigh_logm_backward(matrices, grad)
        return resolvent_logm_backward(matrices, grad, eps)


@logm_backward_op.register_fake
def _(matrices: Tensor, grad: Tensor, eps: float, backend: str) -> Tensor:
    return matrices.new_empty(matrices.shape)


@torch.library.custom_op("firn_spd::log_loss", mutates_args=())
def log_loss_op(matrices: Tensor, target: Tensor, eps: float, backend: str, with_grad: bool) -> tuple[Tensor, Tensor]:
    """||log A - T||_F^2 [b] and, in the same pass, its gradient in A [b, n, n] ([0] without `with_grad`)."""
    name = choice.resolve(backend, matrices)
    with full_fp32(matrices.device):
        if name == "eigh":
            return eigh_loss(matrices, target, with_grad)
        return resolvent_loss(matrices, target, eps, with_grad)


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


def _loss_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _loss_backward(ctx, grad_loss, grad_of_gradient):  # type: ignore[no-untyped-def]
    if grad_of_gradient is not None:
        raise RuntimeError(
            "firn_spd::log_loss is differentiable once, and a second derivative was asked for. "
            "Call backward without create_graph."
        )
    (gradient,) = ctx.saved_tensors
    grad_matrices = None if grad_loss is None else grad_loss[:, None, None] * gradient
    return grad_matrices, None, None, None, None


logm_op.register_autograd(_logm_backward, setup_context=_logm_setup)
log_loss_op.register_autograd(_loss_backward, setup_context=_loss_setup)
