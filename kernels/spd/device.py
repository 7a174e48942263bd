"""What the SPD operations ask of a device: full fp32 products, and whether the Triton kernels run on it."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator

import torch
from torch import Tensor

MIN_CAPABILITY = (8, 0)
"""TF32 tensor cores."""


@contextlib.contextmanager
def full_fp32(device: torch.device) -> Iterator[None]:
    """Autocast off, and fp32 products neither in TF32 (CUDA) nor in bf16 (oneDNN) while the block runs.

    An inverse computed with TF32 products is wrong in its second or third digit, and a trainer may well have
    called `torch.set_float32_matmul_precision("high")`. On CUDA the device also becomes the current one, on which
    Triton launches. Only host-side state changes: safe in graph capture.
    """
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with on_device, torch.autocast(device.type, enabled=False):
            yield
    finally:
        backend.fp32_precision = before


def fused(matrices: Tensor, limit: int | None = None) -> bool:
    """Whether Triton kernels take [b, n, n] matrices of this device and dtype, and n up to `limit`."""
    small = limit is None or matrices.shape[-1] <= limit
    return small and matrices.dtype == torch.float32 and _has_kernels(matrices.device)


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":  # tests ask Triton to interpret its kernels there
        return os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
