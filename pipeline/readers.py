"""Single passes over given rows: crops for the teacher cache and for probes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from common.errors import UserError
from pipeline.augmentation import Augmentation
from pipeline.backend import choose_backend, default_num_threads, resolve_device
from pipeline.crops import BackendOptions, BadSampleError, CropRequest, Crops, CropWork, center_work, teacher_work
from pipeline.feeder import Feeder
from pipeline.jobs import FailurePolicy, Job, Readahead, Ready, receive, run, to_device
from pipeline.order import DEFAULT_BLOCK, DEFAULT_WINDOW
from pipeline.plan import CropPlan, center_crop_plan, crop_plan, global_crops_spec
from shards.folder import ShardFolder

B = TypeVar("B")

_PREFETCH = 2
_READAHEAD_ROWS = DEFAULT_BLOCK * DEFAULT_WINDOW

_MakePlan = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], CropPlan]


@dataclass(frozen=True)
class TeacherCropBatch:
    """The global crops of `b` images as the teacher sees them, for one view set.

    Attributes:
        rows: rows of the shard index, int64 [b].
        uids: sample ids, uint64 [b].
        image_crcs: crc32c of the encoded images, uint32 [b].
        view_set: the view set.
        crops: uint8 [g*b, G, G, 3], crop-major.
        global_crops_spec: int32 [b, g, 6], see `pipeline.plan.global_crops_spec`.
    """

    rows: npt.NDArray[np.int64]
    uids: npt.NDArray[np.uint64]
    image_crcs: npt.NDArray[np.uint32]
    view_set: int
    crops: UInt8[Tensor, "gb G G 3"]
    global_crops_spec: npt.NDArray[np.int32]


@dataclass(frozen=True)
class CenterCropBatch:
    """One centre crop of each of `b` images.

    Attributes:
        rows: rows of the shard index, int64 [b].
        crops: uint8 [b, size, size, 3].
        labels: class labels, -1 where unknown, int64 [b].
    """

    rows: npt.NDArray[np.int64]
    crops: UInt8[Tensor, "b size size 3"]
    labels: Int64[Tensor, " b"]


def in_batches(rows: npt.ArrayLike, batch_size: int) -> list[npt.NDArray[np.int64]]:
    """Cut rows into batches, the last one partial; UserError for a batch size below 1."""
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}. It must be at least 1. Change batch_size.")
    rows = np.asarray(rows, np.int64).reshape(-1)
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def read_teacher_crops(
    shards: str | Path,
    batches: Sequence[npt.NDArray[np.int64]],
    *,
    view_set: int,
    seed: int,
    augmentation: Augmentation,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    num_threads: int | None = None,
    hw_decoder: bool = False,
) -> Iterator[TeacherCropBatch]:
    """Read given batches of rows in their order; one batch of crops for each.

    The crops equal, bit for bit, the `teacher_crops` that `open_loader` gives with the same backend and device
    for the same row, view set, seed and augmentation.

    Args:
        shards: folder of packed shards.
        batches: rows of the index in any order, such as `in_batches` makes.
        view_set: fixes boxes and flips.
        seed: 64-bit seed.
        augmentation: of which only what the teacher sees matters, see `Augmentation.geometry_fingerprint`.
        backend: `auto`, `dali`, `cpu` or `torch`.
        device: where the crops are wanted.
        num_threads: threads that decode and crop; by default the usable cores, at most 8.
        hw_decoder: see `BackendOptions`.

    Raises:
        UserError: at the call for settings and shards, while iterating for a sample that cannot be decoded.
    """
    folder = ShardFolder(shards)

    def plan(chosen: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> CropPlan:
        uids = folder.index.uid[chosen]
        return crop_plan(uids, sizes, view_set=view_set, epoch=0, seed=seed, augmentation=global_only)

    def assemble(job: Job, crops: Crops) -> TeacherCropBatch:
        made = crops.global_crops if augmentation.teacher_photometric else crops.clean_crops
        assert made is not None
        request = job.request
        return TeacherCropBatch(
            rows=job.rows,
            uids=folder.index.uid[job.rows],
            image_crcs=folder.index.crc32c[job.rows],
            view_set=view_set,
            crops=made,
            global_crops_spec=global_crops_spec(request.plan, request.sizes, augmentation.num_global_crops),
        )

    global_only = augmentation.global_only()
    options = _options(device, num_threads, batches, hw_decoder)
    return _read(folder, batches, teacher_work(augmentation), options, backend, plan, assemble)


def read_center_crops(
    shards: str | Path,
    rows: npt.ArrayLike,
    *,
    size: int,
    crop_ratio: float = 0.875,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    num_threads: int | None = None,
    hw_decoder: bool = False,
) -> Iterator[CenterCropBatch]:
    """Read the centre crops of rows in their order, the last batch partial.

    Args:
        shards: folder of packed shards.
        rows: rows of the index, in any order.
        size: side of a crop in pixels.
        crop_ratio: side of the box over the image's shorter side.
        backend: `auto`, `dali`, `cpu` or `torch`.
        device: where the crops are wanted.
        batch_size: images of a batch.
        num_threads: threads that decode and crop.
        hw_decoder: see `BackendOptions`.

    Raises:
        UserError: at the call for settings and shards, while iterating for a sample that cannot be decoded.
    """
    folder = ShardFolder(shards)
    batches = in_batches(rows, batch_size)
    options = _options(device, num_threads, batches, hw_decoder)
    center_crop_plan(np.ones((1, 2)), crop_ratio=crop_ratio)

    def plan(_: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> CropPlan:
        return center_crop_plan(sizes, crop_ratio=crop_ratio)

    def assemble(job: Job, crops: Crops) -> CenterCropBatch:
        assert crops.clean_crops is not None
        labels = to_device(folder.index.label[job.rows].astype(np.int64), options.device)
        return CenterCropBatch(rows=job.rows, crops=crops.clean_crops, labels=labels)

    return _read(folder, batches, center_work(size), options, backend, plan, assemble)


def _options(
    device: str | torch.device,
    num_threads: int | None,
    batches: Sequence[npt.NDArray[np.int64]],
    hw_decoder: bool,
) -> BackendOptions:
    batch_size = max((len(rows) for rows in batches), default=1)
    threads = default_num_threads() if num_threads is None else num_threads
    return BackendOptions(resolve_device(device), threads, batch_size, hw_decoder)


def _read(
    folder: ShardFolder,
    batches: Sequence[npt.NDArray[np.int64]],
    work: CropWork,
    options: BackendOptions,
    backend: str,
    plan: _MakePlan,
    assemble: Callable[[Job, Crops], B],
) -> Iterator[B]:
    chosen = np.concatenate([np.empty(0, np.int64), *batches])
    if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(folder)):
        raise UserError(
            f"{folder.path}: rows from {chosen.min()} to {chosen.max()} asked for, there are {len(folder)}. "
            "Choose rows of these shards."
        )
    taken, _ = choose_backend(backend, options.device)
    make = functools.partial(_batches, folder, batches, work, options, taken, plan, assemble)
    return _iterate(make)


def _iterate(make: Callable[[], Iterator[Ready[B]]]) -> Iterator[B]:
    feeder = Feeder(make, depth=_PREFETCH, name="crop-reader")
    try:
        while True:
            try:
                ready = feeder.get()
            except StopIteration:
                return
            yield receive(ready)
    finally:
        feeder.close()


def _batches(
    folder: ShardFolder,
    batches: Sequence[npt.NDArray[np.int64]],
    work: CropWork,
    options: BackendOptions,
    backend: str,
    plan: _MakePlan,
    assemble: Callable[[Job, Crops], B],
) -> Iterator[Ready[B]]:
    failures = FailurePolicy("raise")

    def jobs() -> Iterator[Job]:
        ahead = Readahead(folder, np.concatenate([np.empty(0, np.int64), *batches]), _READAHEAD_ROWS)
        start = 0
        for part in batches:
            ahead.step(start, len(part))
            start += len(part)
            sizes = folder.sizes(part)
            yield Job(part, CropRequest(folder.jpegs(part), sizes, plan(part, sizes)))

    def repair(job: Job, error: BadSampleError) -> Job:
        failures.report(folder, {int(job.rows[i]): reason for i, reason in error.reasons.items()})
        raise AssertionError("the policy raises")

    with folder:
        yield from run(backend, work, options, jobs(), repair, assemble)
