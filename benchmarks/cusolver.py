"""cuSOLVER's batched eigensolver, called in the library that torch has loaded: the baseline where torch <= 2.11
solves CUDA matrices one by one."""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LIBRARIES = ("libcusolver.so.12", "libcusolver.so.11")
"""Of CUDA 13 and 12. The second has `cusolverDnXsyevBatched` from CUDA 12.6.2 on."""
NEEDS_ZEROED_WORKSPACE_BEFORE = 11703
"""Older versions read their workspace before they write it (github.com/pytorch/pytorch/issues/192483)."""
_VECTORS = 1  # CUSOLVER_EIG_MODE_VECTOR
_LOWER = 0  # CUBLAS_FILL_MODE_LOWER
_DATA_TYPES = {torch.float32: 0, torch.float64: 1}  # CUDA_R_32F, CUDA_R_64F

_POINTER, _INT, _LONG, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_PROBLEM = (_POINTER, _POINTER, _INT, _INT, _LONG, _INT, _POINTER, _LONG, _INT, _POINTER, _INT)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cusolverGetVersion": (ctypes.POINTER(_INT),),
    "cusolverDnCreate": (ctypes.POINTER(_POINTER),),
    "cusolverDnCreateParams": (ctypes.POINTER(_POINTER),),
    "cusolverDnSetStream": (_POINTER, _POINTER),
    "cusolverDnXsyevBatched_bufferSize": (*_PROBLEM, ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE), _LONG),
    "cusolverDnXsyevBatched": (*_PROBLEM, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _LONG),
}


@dataclass(frozen=True)
class _Solver:
    """A handle belongs to one device and one thread at a time."""

    handle: int
    parameters: int
    zeroed_workspace: bool


@functools.cache
def load_library() -> Any:
    """The library with its signatures declared, or None where there is none with the batched solver."""
    for name in LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if all(hasattr(library, function) for function in _SIGNATURES):
            for function, arguments in _SIGNATURES.items():
                getattr(library, function).argtypes = arguments
                getattr(library, function).restype = _INT
            return library
    return None


def _call(library: Any, function: str, *arguments: Any) -> None:
    status = getattr(library, function)(*arguments)
    if status:
        raise RuntimeError(
            f"{function}: cuSOLVER gave status {status}. A batch of fewer matrices may pass; "
            "torch >= 2.12 or backend='resolvent' does without this call."
        )


@functools.cache
def _solver(device: torch.device, thread: int) -> _Solver:
    library = load_library()
    handle, parameters, version = _POINTER(), _POINTER(), _INT()
    _call(library, "cusolverDnCreate", ctypes.byref(handle))
    _call(library, "cusolverDnCreateParams", ctypes.byref(parameters))
    _call(library, "cusolverGetVersion", ctypes.byref(version))
    return _Solver(handle.value or 0, parameters.value or 0, version.value < NEEDS_ZEROED_WORKSPACE_BEFORE)


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


def batched_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [b, n] ascending and vectors [b, n, n] of symmetric fp32 or fp64 matrices on the current device.

    On torch's current stream, in one call. What does not converge gets NaN eigenvalues. `load_library` must have
    found the library. Raises RuntimeError where cuSOLVER refuses the call.
    """
    library = load_library()
    solver = _solver(matrices.device, threading.get_ident())
    batch, n, _ = matrices.shape
    kind = _DATA_TYPES[matrices.dtype]
    vectors = matrices.clone(memory_format=torch.contiguous_format)  # overwritten; by columns, so transposed below
    values = matrices.new_empty(batch, n)
    failed = torch.zeros(batch, dtype=torch.int32, device=matrices.device)
    problem = (
        *(solver.handle, solver.parameters, _VECTORS, _LOWER, n),
        *(kind, vectors.data_ptr(), n, kind, values.data_ptr(), kind),
    )
    _call(library, "cusolverDnSetStream", solver.handle, _stream(matrices.device))
    on_device, on_host = _SIZE(), _SIZE()
    sizes = (ctypes.byref(on_device), ctypes.byref(on_host))
    _call(library, "cusolverDnXsyevBatched_bufferSize", *problem, *sizes, batch)
    make = torch.zeros if solver.zeroed_workspace else torch.empty
    workspace = make(max(on_device.value, 1), dtype=torch.uint8, device=matrices.device)
    host = ctypes.create_string_buffer(max(on_host.value, 1))
    buffers = (workspace.data_ptr(), on_device.value, ctypes.addressof(host), on_host.value)
    _call(library, "cusolverDnXsyevBatched", *problem, *buffers, failed.data_ptr(), batch)
    return values.masked_fill_((failed != 0)[:, None], torch.nan), vectors.mT
