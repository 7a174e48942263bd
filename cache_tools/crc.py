"""CRC-32C without the interpreter lock."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt


@functools.cache
def _library() -> Callable[[int, int, int], int] | None:
    """Return `crc32c_extend` of the C library that google_crc32c's wheel ships, or None.

    The Python binding holds the interpreter lock while it computes and takes read-only memory alone; a
    foreign call does neither, so reader threads overlap. Without the bundled library the binding is used.
    """
    folder = Path(google_crc32c.__file__).resolve().parent
    candidates = [*folder.parent.glob("google_crc32c.libs/libcrc32c*"), *folder.glob(".dylibs/libcrc32c*")]
    for candidate in sorted(candidates):
        try:
            extend = ctypes.CDLL(str(candidate)).crc32c_extend
        except (OSError, AttributeError):
            continue
        extend.argtypes = [ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t]
        extend.restype = ctypes.c_uint32
        if extend(0, ctypes.c_char_p(b"123456789"), 9) == 0xE3069283:  # the published check value
            return extend
    return None


def crc32c(data: bytes | bytearray | memoryview | npt.NDArray[np.generic], initial: int = 0) -> int:
    """Return the CRC-32C of contiguous `data`, continuing from `initial`."""
    octets = np.frombuffer(data, dtype=np.uint8)
    extend = _library()
    if extend is None:
        return int(google_crc32c.extend(initial, octets.tobytes()))
    return extend(initial, octets.ctypes.data, octets.size)


def crc32c_rows(rows: npt.NDArray[np.uint8], chosen: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.uint32]:
    """Return the CRC-32C of each row, or of the chosen ones.

    Args:
        rows: uint8 [m, bytes]; each row contiguous.
        chosen: int64 [k]; None for all.

    Returns:
        uint32 [m] or [k].
    """
    assert rows.ndim == 2 and rows.dtype == np.uint8 and (rows.shape[1] <= 1 or rows.strides[1] == 1)
    places = range(len(rows)) if chosen is None else chosen.tolist()
    extend = _library()
    if extend is None:
        return np.array([crc32c(rows[place]) for place in places], dtype=np.uint32)
    start, stride, length = rows.ctypes.data, rows.strides[0], rows.shape[1]
    return np.array([extend(0, start + place * stride, length) for place in places], dtype=np.uint32)
