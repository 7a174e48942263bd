"""Full fp32 matrix products inside the SPD operations, whatever the training run has set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


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
