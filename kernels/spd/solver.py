"""A batched symmetric eigensolver: torch's own, or cuSOLVER's called directly where torch loops."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from kernels.spd import cusolver

logger = logging.getLogger(__name__)

LOOP_FREE_UP_TO = 32
"""torch 2.11 and older solve larger CUDA matrices one by one (github.com/pytorch/pytorch/issues/174674)."""


def torch_loops_over_matrices(version: str | None = None) -> bool:
    """True where `torch.linalg.eigh` on CUDA is a host loop over single matrices (torch <= 2.11)."""
    major, minor = (version or torch.__version__).split("+")[0].split(".")[:2]
    return (int(major), int(minor)) <= (2, 11)


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def solver_for(matrices: Tensor) -> str:
    """Who solves [b, n, n] matrices: "torch", "cusolver" (called directly), or "torch, one by one"."""
    loops = (
        matrices.device.type == "cuda"
        and torch.version.cuda is not None
        and matrices.shape[-1] > LOOP_FREE_UP_TO
        and torch_loops_over_matrices()
    )
    if not loops:
        return "torch"
    return "torch, one by one" if cusolver.load_library() is None else "cusolver"


def batched_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [b, n] ascending and vectors [b, n, n] of symmetric fp32 or fp64 matrices on any device.

    The device must be the current one. Raises torch.linalg.LinAlgError where LAPACK does. torch's own solver
    makes the host wait on CUDA.
    """
    name = solver_for(matrices)
    if name == "cusolver":
        _say_once(f"torch {torch.__version__} solves CUDA matrices one by one: eigh calls cuSOLVER's batched solver")
        return cusolver.batched_eigh(matrices)
    if name == "torch, one by one":
        _say_once(
            f"torch {torch.__version__} solves CUDA matrices one by one, {matrices.shape[0]} times a call, and this "
            "cuSOLVER has no batched solver; install torch >= 2.12, or use backend='resolvent'"
        )
    values, vectors = torch.linalg.eigh(matrices)
    return values, vectors
