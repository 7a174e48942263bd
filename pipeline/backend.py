"""The contract of a crop backend: encoded images and a plan in, uint8 crops out; and the choice of one by name."""

from __future__ import annotations

import difflib
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.augmentation import Augmentation
from pipeline.plan import CropPlan
from shards.errors import UserError

BACKENDS = ("auto", "dali", "cpu", "torch")

_MAX_DEFAULT_THREADS = 8
_log = logging.getLogger("pipeline")


@dataclass(frozen=True)
class CropWork:
    """What a backend makes of every image; fixed for its lifetime.

    Attributes:
        num_global: views of `global_size`.
        num_local: views of `local_size`, after the global ones in the plan.
        global_size: pixels a side.
        local_size: pixels a side.
        clean: give the global crops after resize and flip only.
        distorted: give global and local crops with the plan's photometrics.
        blur: for each view, whether the plan may blur it.
        solarize: for each view, whether the plan may solarize it.
    """

    num_global: int
    num_local: int
    global_size: int
    local_size: int
    clean: bool
    distorted: bool
    blur: tuple[bool, ...]
    solarize: tuple[bool, ...]

    @property
    def num_views(self) -> int:
        """Views of an image."""
        return self.num_global + self.num_local


@dataclass(frozen=True)
class CropRequest:
    """One batch for a backend.

    Attributes:
        jpegs: encoded images, uint8 [bytes] each; views of the shards, valid while the source is open.
        sizes: height and width that the plan was made for, int64 [n, 2].
        plan: boxes and photometrics of the n images.
    """

    jpegs: Sequence[npt.NDArray[np.uint8]]
    sizes: npt.NDArray[np.int64]
    plan: CropPlan


@dataclass(frozen=True)
class Crops:
    """What a backend made of a request, on its device, crop-major; None where the work does not ask for it.

    Attributes:
        global_crops: uint8 [g*n, G, G, 3].
        local_crops: uint8 [l*n, L, L, 3].
        clean_crops: uint8 [g*n, G, G, 3].
    """

    global_crops: Tensor | None
    local_crops: Tensor | None
    clean_crops: Tensor | None


class BadSampleError(Exception):
    """Samples of a request that cannot be decoded or have another size than the plan was made for."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        """Hold the reason for each bad position of the request."""
        super().__init__(str(dict(reasons)))
        self.reasons = dict(reasons)


class CropBackend(Protocol):
    """Turns requests into crops, in order, some of them in flight."""

    depth: int
    """Requests that are worth having in flight."""

    def submit(self, request: CropRequest) -> None:
        """Start a request."""

    def collect(self) -> Crops:
        """Finish the oldest request.

        Raises:
            BadSampleError: some samples are bad; the request is dropped, `reset` must follow.
        """

    def reset(self) -> None:
        """Drop all requests in flight and be ready for new ones."""

    def close(self) -> None:
        """Free threads and memory."""


@dataclass(frozen=True)
class BackendOptions:
    """How a backend runs; none of it but `hw_decoder_load` may change a pixel.

    Attributes:
        device: where the crops are made or brought to.
        num_threads: threads that decode and resize.
        max_batch_size: largest request.
        hw_decoder_load: DALI on a GPU: 0.0 decodes all images with CUDA, 1.0 all with the hardware engine.
            The two give different pixels, so a mix would make a crop depend on its batch.
    """

    device: torch.device
    num_threads: int
    max_batch_size: int
    hw_decoder_load: float = 0.0


def training_work(a: Augmentation, *, teacher_crops: bool) -> CropWork:
    """Distorted global and local crops; clean ones too where a live teacher needs them."""
    clean = teacher_crops and not a.teacher_photometric
    return _work(a, num_local=a.num_local_crops, clean=clean, distorted=True)


def teacher_work(a: Augmentation) -> CropWork:
    """The global crops as the teacher sees them, and nothing else."""
    return _work(a, num_local=0, clean=not a.teacher_photometric, distorted=a.teacher_photometric)


def center_work(size: int) -> CropWork:
    """One clean crop of `size` pixels."""
    return CropWork(1, 0, size, size, clean=True, distorted=False, blur=(False,), solarize=(False,))


def _work(a: Augmentation, *, num_local: int, clean: bool, distorted: bool) -> CropWork:
    blur = [p > 0 for p in a.blur_prob_global] + [a.blur_prob_local > 0] * num_local
    solarize = [p > 0 for p in a.solarize_prob_global] + [False] * num_local
    return CropWork(
        a.num_global_crops,
        num_local,
        a.global_crops_size,
        a.local_crops_size,
        clean=clean,
        distorted=distorted,
        blur=tuple(blur),
        solarize=tuple(solarize),
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_num_threads() -> int:
    """Threads of a backend by default: the usable cores, at most 8."""
    return min(usable_cores(), _MAX_DEFAULT_THREADS)


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
        close = difflib.get_close_matches(name, BACKENDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"backend: {name!r} is unknown.{hint} There are: {', '.join(BACKENDS)}.")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: {str(device)!r} is not supported by the data path. Choose cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {str(device)!r} asked for, but torch sees no CUDA device. Choose cpu.")
    if name in ("cpu", "torch"):
        return name, "it was asked for"
    from pipeline import dali

    missing = dali.missing_reason()
    if name == "dali":
        if missing:
            raise UserError(
                f"backend 'dali': {missing}. Run `pip install nvidia-dali-cuda130`, or choose --backend cpu "
                "or --backend torch."
            )
        return name, "it was asked for"
    if not missing:
        return "dali", "DALI is installed"
    if device.type == "cuda":
        return "torch", f"{missing}; the torch backend also crops on the GPU"
    return "cpu", f"{missing}; the cpu backend is the fastest without it"


def open_backend(name: str, work: CropWork, options: BackendOptions) -> CropBackend:
    """Build the backend of that name (see `choose_backend`).

    Raises:
        UserError: as `choose_backend`, or an option is out of its range.
    """
    if options.hw_decoder_load not in (0.0, 1.0):
        raise UserError(
            f"hw_decoder_load is {options.hw_decoder_load}. The hardware engine and the CUDA decoder give "
            "different pixels, so a mix would make a crop depend on its batch. Choose 0.0 or 1.0."
        )
    if options.num_threads < 1:
        raise UserError(f"num_threads is {options.num_threads}. It must be at least 1. Change num_threads.")
    taken, _ = _choose(name, options.device)
    if taken == "dali":
        from pipeline.dali import DaliCrops

        return DaliCrops(work, options)
    if taken == "torch":
        from pipeline.torch_crops import TorchCrops

        return TorchCrops(work, options)
    from pipeline.cpu_crops import CpuCrops

    return CpuCrops(work, options)


@functools.cache
def _log_once(message: str) -> None:
    _log.info(message)
