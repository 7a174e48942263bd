"""Host memory for the encoded rows of a batch, and their way to the device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cache_tools.format import ArrayLayout


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of copies to a device: on the caller's own they would wait for the step before."""
    return torch.cuda.Stream(device)


class HostRows:
    """Encoded rows of one batch in host memory, pinned for CUDA; used again for later batches."""

    def __init__(self, arrays: tuple[ArrayLayout, ...], rows: int, *, pinned: bool):
        self.rows = rows
        self.pinned = pinned
        self.tensors = {
            array.name: torch.empty((rows, array.row_bytes), dtype=torch.uint8, pin_memory=pinned) for array in arrays
        }
        self.bytes = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        self._copied: torch.cuda.Event | None = None

    def values(self, array: ArrayLayout, rows: int) -> Tensor:
        """Return the first `rows` rows in their own dtype and shape, sharing memory."""
        dtype = {"int8": torch.int8, "float16": torch.float16}[array.dtype]
        return self.tensors[array.name][:rows].view(dtype).view(rows, *array.tail)

    def to(self, device: torch.device, arrays: tuple[ArrayLayout, ...], rows: int) -> dict[str, Tensor]:
        """Return the first `rows` rows of each array on `device`, ready for its current stream.

        On the CPU they share memory. On CUDA the host does not wait; `wait` must come before the memory is written
        again.
        """
        if device.type != "cuda":
            return {array.name: self.values(array, rows).to(device) for array in arrays}
        stream, current = _copy_stream(device), torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):
            moved = {array.name: self.values(array, rows).to(device, non_blocking=True) for array in arrays}
            self._copied = torch.cuda.Event()
            self._copied.record(stream)
        current.wait_event(self._copied)
        for tensor in moved.values():
            tensor.record_stream(current)
        return moved

    def is_ready(self) -> bool:
        """Return whether no copy reads this memory any more."""
        return self._copied is None or self._copied.query()

    def wait(self) -> None:
        """Wait until `is_ready`."""
        if self._copied is not None:
            self._copied.synchronize()
