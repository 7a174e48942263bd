"""The crop backends by name: which is taken, and why."""

from __future__ import annotations

import functools
import logging
import os

import torch

from common.errors import UserError, unknown_name
from pipeline.cpu_crops import CpuCrops
from pipeline.crops import BackendOptions, CropBackend, CropWork
from pipeline.dali import DaliCrops, missing_reason
from pipeline.torch_crops import TorchCrops

BACKENDS = ("auto", "dali", "cpu", "torch")

_MAX_DEFAULT_THREADS = 12
_log = logging.getLogger("pipeline")


def usable_cores(process: int = 0) -> int:
    """Cores that this process, or another one, may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(process))
    return os.cpu_count() or 1


def default_num_threads() -> int:
    """Threads of a backend by default: this rank's share of the machine's usable cores, at most 12."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # `torchrun --numa-binding` binds a rank to cores that others may share. The launcher may use those of all.
    of_all = usable_cores(os.getppid()) if ranks > 1 else usable_cores()
    return max(1, min(of_all // ranks, usable_cores(), _MAX_DEFAULT_THREADS))


def resolve_device(device: str | torch.device) -> torch.device:
    """A device with its index, as another thread has another current device."""
    resolved = torch.device(device)
    if resolved.type == "cuda" and resolved.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


def choose_backend(name: str, device: torch.device) -> tuple[str, str]:
    """Resolve a backend's name, and log, once, which was taken and why.

    Args:
        name: one of `BACKENDS`.
        device: where the crops are wanted.

    Returns:
        The backend taken, and why in a sentence.

    Raises:
        UserError: no backend has that name, DALI was asked for and is not installed, or there is no such
            device.
    """
    taken, reason = _choose(name, device)
    _log_once(f"crop backend: {taken} on {device}: {reason}")
    return taken, reason


def _choose(name: str, device: torch.device) -> tuple[str, str]:
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: {str(device)!r} is not supported by the data path. Choose cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {str(device)!r} asked for, but torch sees no CUDA device. Choose cpu.")
    if name in ("cpu", "torch"):
        return name, "it was asked for"
    missing = missing_reason()
    if name == "dali":
        if missing:
            raise UserError(
                f"backend 'dali': {missing}. Run `pip install nvidia-dali-cuda130`, or choose --backend cpu "
                "or --backend torch."
            )
        return name, "it was asked for"
    if not missing:
        faster = "; on a CPU the cpu backend is faster, with nearly the same pixels"
        return "dali", "DALI is installed" + (faster if device.type == "cpu" else "")
    if device.type == "cuda":
        return "torch", f"{missing}; the torch backend also crops on the GPU"
    return "cpu", f"{missing}; the cpu backend is the fastest without it"


def open_backend(name: str, work: CropWork, options: BackendOptions) -> CropBackend:
    """Build the backend of that name (see `choose_backend`).

    Raises:
        UserError: as `choose_backend`.
    """
    taken, _ = _choose(name, options.device)
    if taken == "dali":
        return DaliCrops(work, options)
    if taken == "torch":
        return TorchCrops(work, options)
    return CpuCrops(work, options)


@functools.cache
def _log_once(message: str) -> None:
    _log.info(message)
