"""Launches of the Triton kernels, and where they run."""

from __future__ import annotations

from torch import Tensor

from kernels.spd.poles import RationalLog


def resolvent_fits(matrices: Tensor) -> bool:
    return False


def resolvent_logm(matrices: Tensor, rational: RationalLog) -> Tensor:
    raise NotImplementedError


def resolvent_logm_backward(matrices: Tensor, upstream: Tensor, rational: RationalLog) -> Tensor:
    raise NotImplementedError


def resolvent_loss(
    matrices: Tensor, target: Tensor, rational: RationalLog, with_grad: bool
) -> tuple[Tensor, Tensor]:
    raise NotImplementedError
