"""Which backend runs: as asked, or the one that was measured as fastest for the device and size."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def resolve(backend: str, matrices: Tensor) -> str:
    """ "eigh" or "resolvent" for [b, n, n] matrices; a pure function of backend, device, n and dtype."""
    return _resolve(backend, matrices.device.type, matrices.shape[-1], matrices.dtype == torch.float64)


@functools.cache
def _resolve(backend: str, device: str, n: int, is_double: bool) -> str:
    if backend != "auto":
        return backend
    return "eigh"
