"""Host memory for the encoded rows of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from cache_tools.format import ArrayLayout


class HostRows:
    """Encoded rows of one batch in host memory, pinned for CUDA; used again for later batches."""

    def __init__(self, arrays: tuple[ArrayLayout, ...], rows: int, *, pinned: bool):
        self.rows = rows
        self.pinned = pinned
        self.tensors = {
            array.name: torch.empty((rows, array.row_bytes), dtype=torch.uint8, pin_memory=pinned) for array in arrays
        }
        self.bytes = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        self.copied: torch.cuda.Event | None = None

    def values(self, array: ArrayLayout, rows: int) -> Tensor:
        """Return the first `rows` rows in their own dtype and shape, sharing memory."""
        dtype = {"int8": torch.int8, "float16": torch.float16}[array.dtype]
        return self.tensors[array.name][:rows].view(dtype).view(rows, *array.tail)
