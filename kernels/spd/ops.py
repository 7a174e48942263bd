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
        log = eigh_logm(matrices) if name == "eigh" else resolvent_logm(matrices, eps)
    return log.contiguous()  # what the compiler was told; products of column-major vectors are not


@logm_op.register_fake
def _(matrices: Tensor, eps: float, backend: str) -> Tensor:
    return matrices.new_empty(matrices.shape)


@torch.library.custom_op("firn_spd::logm_backward", mutates_args=())
def logm_backward_op(matrices: Tensor, grad: Tensor, eps: float, backend: str) -> Tensor:
    """Gradient of sum(grad * log A) in A. It factorises again: the forward pass keeps nothing but A."""
    name = choice.resolve(backend, matrices)
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
    name = choice.resolve(backend, matrices)
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
