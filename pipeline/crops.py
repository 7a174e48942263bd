"""The contract of a crop backend: encoded images and a plan in, uint8 crops out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.errors import UserError
from pipeline.augmentation import Augmentation
from pipeline.plan import CropPlan

T = TypeVar("T")


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
        jpegs: encoded images, uint8 [bytes] each; copies of the shards' bytes.
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


def finished(tasks: Sequence[Future[T]]) -> list[T]:
    """Wait for one task a sample and give their results.

    Raises:
        BadSampleError: with the reasons of all tasks that ended in a ValueError.
    """
    results, bad = [], {}
    for i, task in enumerate(tasks):
        try:
            results.append(task.result())
        except ValueError as error:
            bad[i] = str(error)
    if bad:
        raise BadSampleError(bad)
    return results


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
    """How a backend runs; none of it but `hw_decoder` may change a pixel.

    Attributes:
        device: where the crops are made or brought to.
        num_threads: threads that decode and resize.
        max_batch_size: images of the largest request.
        hw_decoder: DALI on a GPU decodes all images by the hardware engine instead of CUDA. The two give different
            pixels, so they are never mixed: a crop would depend on its batch.

    Raises:
        UserError: a field is out of its range.
    """

    device: torch.device
    num_threads: int
    max_batch_size: int
    hw_decoder: bool = False

    def __post_init__(self) -> None:
        if self.num_threads < 1:
            raise UserError(f"num_threads is {self.num_threads}. It must be at least 1. Change num_threads.")
        if self.max_batch_size < 1:
            raise UserError(f"batch size is {self.max_batch_size}. It must be at least 1. Change it.")


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Who decodes and crops, and with what."""

    backend: Literal["auto", "dali", "cpu", "torch"] = "auto"
    """Who decodes and crops."""
    num_threads: int | None = None
    """Decoding threads of a process. None: its share of the machine's usable cores, at most 12."""
    hw_decoder: bool = False
    """With DALI on a GPU: decode all JPEGs by the hardware engine. Its pixels are not those of the CUDA decoder."""

    def reading(self) -> dict[str, Any]:
        """Return these options as keywords of the loader and the readers."""
        return {field.name: getattr(self, field.name) for field in fields(ReadOptions)}


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
