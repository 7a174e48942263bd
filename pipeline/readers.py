"""Single passes over given rows: crops for the teacher cache and for probes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from common.errors import UserError
from pipeline.augmentation import Augmentation
from pipeline.backend import choose_backend, default_num_threads, resolve_device
from pipeline.batch import CropBatch
from pipeline.crops import BackendOptions, BadSampleError, CropRequest, Crops, CropWork, center_work, teacher_work
from pipeline.feeder import Feeder
from pipeline.jobs import FailurePolicy, Job, Readahead, Ready, receive, run, to_device
from pipeline.order import DEFAULT_BLOCK, DEFAULT_WINDOW
from pipeline.plan import CropPlan, center_crop_plan, crop_plan, global_crops_spec
from shards.folder import ShardFolder

_PREFETCH = 2
_READAHEAD_ROWS = DEFAULT_BLOCK * DEFAULT_WINDOW

_MakePlan = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], CropPlan]


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
) -> Iterator[CropBatch]:
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
        num_threads: threads that decode and crop; by default this rank's share of the usable cores, at most 12.
        hw_decoder: see `BackendOptions`.

    Raises:
        UserError: at the call for settings and shards, while iterating for a sample that cannot be decoded.
    """
    folder = ShardFolder(shards)

    def plan(chosen: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> CropPlan:
        uids = folder.index.uid[chosen]
        return crop_plan(uids, sizes, view_set=view_set, epoch=0, seed=seed, augmentation=global_only)

    global_only = augmentation.global_only()
    options = _options(device, num_threads, batches, hw_decoder)
    return _read(folder, batches, teacher_work(augmentation), options, backend, plan, view_set)


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
) -> Iterator[CropBatch]:
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

    return _read(folder, batches, center_work(size), options, backend, plan, view_set=0)


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
    view_set: int,
) -> Iterator[CropBatch]:
    chosen = np.concatenate([np.empty(0, np.int64), *batches])
    if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(folder)):
        raise UserError(
            f"{folder.path}: rows from {chosen.min()} to {chosen.max()} asked for, there are {len(folder)}. "
            "Choose rows of these shards."
        )
    taken, _ = choose_backend(backend, options.device)
    make = functools.partial(_batches, folder, batches, work, options, taken, plan, view_set)
    return _iterate(make)


def _iterate(make: Callable[[], Iterator[Ready[CropBatch]]]) -> Iterator[CropBatch]:
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
    view_set: int,
) -> Iterator[Ready[CropBatch]]:
    failures, index = FailurePolicy("raise"), folder.index

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

    def assemble(job: Job, crops: Crops) -> CropBatch:
        made = crops.clean_crops if work.clean else crops.global_crops
        assert made is not None
        return CropBatch(
            rows=job.rows,
            uids=index.uid[job.rows],
            image_crcs=index.crc32c[job.rows],
            labels=to_device(index.label[job.rows].astype(np.int64), options.device),
            view_set=view_set,
            crops=made,
            global_crops_spec=global_crops_spec(job.request.plan, job.request.sizes, work.num_global),
        )

    with folder:
        yield from run(backend, work, options, jobs(), repair, assemble)
