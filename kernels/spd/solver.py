"""A batched symmetric eigensolver: torch's own, or cuSOLVER's through CuPy where torch loops."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

logger = logging.getLogger(__name__)

LOOP_FREE_UP_TO = 32
"""torch 2.11 and older solve larger CUDA matrices one by one (github.com/pytorch/pytorch/issues/174674)."""


def torch_loops_over_matrices(version: str | None = None) -> bool:
    """True where `torch.linalg.eigh` on CUDA is a host loop over single matrices (torch <= 2.11)."""
    major, minor = (version or torch.__version__).split("+")[0].split(".")[:2]
    return (int(major), int(minor)) <= (2, 11)


@functools.cache
def cupy_eigh_available() -> bool:
    """True where CuPy >= 14 is installed, whose `eigh` is batched, and sees a device."""
    try:
        import cupy
    except ImportError:
        return False
    try:
        return int(cupy.__version__.split(".")[0]) >= 14 and int(cupy.cuda.runtime.getDeviceCount()) > 0
    except cupy.cuda.runtime.CUDARuntimeError:
        return False


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _cupy_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """`cupy.linalg.eigh` on torch's current stream; memory is shared, nothing is copied to the host."""
    import cupy

    stream = torch.cuda.current_stream(matrices.device)
    with cupy.cuda.Device(matrices.device.index), cupy.cuda.ExternalStream(stream.cuda_stream):
        values, vectors = cupy.linalg.eigh(cupy.from_dlpack(matrices.detach().contiguous()))
        return from_dlpack(values), from_dlpack(vectors)


def batched_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [b, n] ascending and vectors [b, n, n] of symmetric fp32 or fp64 matrices on any device.

    Raises torch.linalg.LinAlgError where LAPACK does. On CUDA the host waits for the result.
    """
    loops = (
        matrices.device.type == "cuda"
        and torch.version.cuda is not None
        and matrices.shape[-1] > LOOP_FREE_UP_TO
        and torch_loops_over_matrices()
    )
    if loops and cupy_eigh_available():
        _say_once(f"torch {torch.__version__} solves CUDA matrices one by one: eigh runs through CuPy")
        return _cupy_eigh(matrices)
    if loops:
        _say_once(
            f"torch {torch.__version__} solves CUDA matrices one by one, {matrices.shape[0]} times a call; "
            "install torch >= 2.12 or CuPy >= 14, or use backend='resolvent'"
        )
    values, vectors = torch.linalg.eigh(matrices)
    return values, vectors
