"""Which backend runs: the one that is asked for, or the one that was measured as fastest for device and size."""

from __future__ import annotations

import functools
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.spd.matrices import MAX_TOKENS

logger = logging.getLogger(__name__)

MEASURED_PATH = Path(__file__).with_name("measured.json")
"""Written by `python -m benchmarks.bench_spd --write_choice`."""
LEVEL = 1.1
"""Up to this ratio times are level: it is what two runs of one path differ by on a busy machine."""


@dataclass(frozen=True)
class Measurement:
    """The whole loss, forward and backward, of one batch of n x n fp32 matrices.

    Attributes:
        eigh_ms: median milliseconds of the eigh path.
        resolvent_speedup: median over rounds of the time of eigh over that of the resolvent in the same round.
    """

    device: str
    hardware: str
    n: int
    eigh_ms: float
    resolvent_speedup: float

    @property
    def fastest(self) -> str:
        """The name of the faster backend; the exact one where they are level."""
        return "resolvent" if self.resolvent_speedup > LEVEL else "eigh"


@functools.cache
def load_measurements() -> tuple[Measurement, ...]:
    """All measured rows."""
    return tuple(Measurement(**row) for row in json.loads(MEASURED_PATH.read_text()))


def resolve(backend: str, matrices: Tensor) -> str:
    """ "eigh" or "resolvent" for [b, n, n] matrices: a function of backend, device type, n and dtype only.

    So the teacher's logarithm and the student's loss agree whenever they were given the same backend.
    """
    return _resolve(backend, matrices.device.type, matrices.shape[-1], matrices.dtype)


@functools.cache
def _resolve(backend: str, device: str, n: int, dtype: torch.dtype) -> str:
    if backend != "auto":
        name, reason = backend, "asked for"
    else:
        name, reason = choose(device, n, dtype, load_measurements())
    logger.info("SPD logarithm of %d x %d matrices on %s: %s (%s)", n, n, device, name, reason)
    return name


def choose(device: str, n: int, dtype: torch.dtype, measurements: tuple[Measurement, ...]) -> tuple[str, str]:
    """The backend for "auto", and the reason."""
    if dtype == torch.float64:
        return "eigh", "float64 asks for the exact logarithm"
    if device == "cuda" and n > MAX_TOKENS:
        return "eigh", f"the fused resolvent ends at n = {MAX_TOKENS}; reduce_tokens makes it fit"
    rows = [row for row in measurements if row.device == device]
    if rows:
        row = min(rows, key=lambda row: abs(math.log(row.n / n)))
        return row.fastest, (
            f"measured at n = {row.n} on {row.hardware}: "
            f"the resolvent takes {1 / row.resolvent_speedup:.2f} of the time of eigh"
        )
    if device == "cuda":
        return "resolvent", "not measured on this kind of device; no wait for the host"
    return "eigh", "not measured on this kind of device"
