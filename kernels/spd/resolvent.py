"""Logarithm, distance and gradient by a sum of shifted inverses: no eigenvalues, no wait for the host."""

from __future__ import annotations

from torch import Tensor


def resolvent_logm(matrices: Tensor, eps: float) -> Tensor:
    raise NotImplementedError


def resolvent_logm_backward(matrices: Tensor, grad: Tensor, eps: float) -> Tensor:
    raise NotImplementedError


def resolvent_loss(matrices: Tensor, target: Tensor, eps: float, with_grad: bool) -> tuple[Tensor, Tensor]:
    raise NotImplementedError
