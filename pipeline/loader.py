"""Batches for training, in an order that any run can take up again at any step."""

from __future__ import annotations

import functools
import hashlib
import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.errors import UserError
from pipeline.augmentation import Augmentation
from pipeline.backend import choose_backend, default_num_threads, resolve_device
from pipeline.batch import MultiCropBatch
from pipeline.crops import BackendOptions, BadSampleError, CropRequest, Crops, training_work
from pipeline.feeder import Feeder
from pipeline.jobs import FailurePolicy, Job, Readahead, Ready, receive, run, to_device
from pipeline.masks import block_masks
from pipeline.order import DEFAULT_BLOCK, DEFAULT_WINDOW, epoch_order, rank_positions
from pipeline.plan import PLAN_VERSION, CropPlan, crop_plan, global_crops_spec
from shards.folder import ShardFolder

_PREFETCH = 2
# Rows that the kernel is asked for ahead of time: a window of the order.
_READAHEAD_ROWS = DEFAULT_BLOCK * DEFAULT_WINDOW
# Steps that are planned at once: of the time that one batch's plan takes, most goes into numpy's calls.
_PLANNED_STEPS = 8

_StepPlan = tuple[CropPlan, npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class _Settings:
    """All that decides the stream of batches of one rank."""

    seed: int
    augmentation: Augmentation
    global_batch_size: int
    rank: int
    world_size: int
    view_sets: int | None
    teacher_crops: bool
    rows: npt.NDArray[np.int64]

    @property
    def steps_per_epoch(self) -> int:
        return len(self.rows) // self.global_batch_size

    def view_set(self, epoch: int) -> int:
        return epoch if self.view_sets is None else epoch % self.view_sets

    def identity(self, folder: ShardFolder) -> dict[str, int | str | None]:
        """What a resumed run must share with the one before."""
        return {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "num_rows": len(self.rows),
            "rows": hashlib.sha256(np.ascontiguousarray(self.rows, "<i8").tobytes()).hexdigest(),
            "shards": folder.manifest.fingerprint(),
            "augmentation": self.augmentation.fingerprint(),
            "plan_version": PLAN_VERSION,
            "view_sets": self.view_sets,
        }


class MultiCropLoader:
    """An endless iterator of one rank's `MultiCropBatch`es, epoch after epoch; made by `open_loader`.

    Attributes:
        steps_per_epoch: global batches of an epoch; the rows that are left over wait for other epochs.
        backend: the crop backend taken.
        backend_reason: why, in a sentence.
        data_wait: seconds that the last `next` took.
        failures: the bad samples met so far.
    """

    def __init__(
        self,
        folder: ShardFolder,
        settings: _Settings,
        options: BackendOptions,
        failures: FailurePolicy,
        *,
        backend: str,
        state: Mapping[str, Any] | None,
    ) -> None:
        """Start the feeder at the state's position."""
        self.backend, self.backend_reason = choose_backend(backend, options.device)
        self.steps_per_epoch = settings.steps_per_epoch
        self.failures = failures
        self.data_wait = 0.0
        self._identity = settings.identity(folder)
        self._epoch, self._step = (0, 0) if state is None else _position(state, self._identity)
        if self._step >= self.steps_per_epoch:
            self._epoch, self._step = self._epoch + 1, 0
        # The feeder gets no reference to this object, so that dropping it ends the feeder.
        make = functools.partial(_batches, folder, settings, options, failures, self.backend, self._epoch, self._step)
        self._feeder: Feeder[Ready[MultiCropBatch]] = Feeder(make, depth=_PREFETCH, name="multi-crop-feeder")

    def __iter__(self) -> MultiCropLoader:
        return self

    def __next__(self) -> MultiCropBatch:
        start = time.perf_counter()
        ready = self._feeder.get()
        batch = receive(ready)
        self._epoch, self._step = ready.job.epoch, ready.job.step + 1
        self.data_wait = time.perf_counter() - start
        return batch

    def __enter__(self) -> MultiCropLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def epoch(self) -> int:
        """Epoch of the next batch."""
        return self._epoch + self._step // self.steps_per_epoch

    @property
    def step(self) -> int:
        """Step, within its epoch, of the next batch."""
        return self._step % self.steps_per_epoch

    def state_dict(self) -> dict[str, int | str | None]:
        """The position after the last batch received, and what a resumed run must share; plain Python."""
        return {"epoch": self.epoch, "step": self.step, **self._identity}

    def close(self) -> None:
        """Stop the feeder and wait for it; a second call does nothing."""
        self._feeder.close()


def open_loader(
    shards: str | Path,
    *,
    device: str | torch.device,
    global_batch_size: int,
    seed: int,
    augmentation: Augmentation,
    backend: str = "auto",
    rank: int = 0,
    world_size: int = 1,
    state: Mapping[str, Any] | None = None,
    view_sets: int | None = None,
    teacher_crops: bool = True,
    rows: npt.ArrayLike | None = None,
    num_threads: int | None = None,
    hw_decoder: bool = False,
    on_bad_sample: str = "raise",
    skip_budget: float = 0.001,
) -> MultiCropLoader:
    """Open the stream of training batches of one rank.

    The global batch of an (epoch, step) is the same for every world size; rank r takes its r-th contiguous
    slice. The view set of an epoch is `epoch % view_sets`, or the epoch itself without `view_sets`.

    Args:
        shards: folder of packed shards.
        device: where the batches are wanted, cpu or cuda.
        global_batch_size: images of a step over all ranks; a multiple of `world_size`.
        seed: 64-bit seed of order, crops and masks.
        augmentation: crops, photometrics and masks.
        backend: `auto`, `dali`, `cpu` or `torch`.
        rank: this process.
        world_size: all processes.
        state: a `state_dict` to go on from; its run may have had another world size, backend or device.
        view_sets: number of view sets of the teacher cache; None without one.
        teacher_crops: hand out the global crops as a live teacher sees them.
        rows: rows to train on, each once; None for all.
        num_threads: threads that decode and crop; by default this rank's share of the usable cores, at most 12.
        hw_decoder: see `BackendOptions`.
        on_bad_sample: `raise` stops at a sample that cannot be decoded, `skip` replaces it by the row half an epoch
            away in the order.
        skip_budget: share of the samples that `skip` may replace.

    Raises:
        UserError: a setting is out of its range, the shards were changed, or the state is of another run.
    """
    folder = ShardFolder(shards)
    settings = _Settings(
        seed=seed,
        augmentation=augmentation,
        global_batch_size=global_batch_size,
        rank=rank,
        world_size=world_size,
        view_sets=view_sets,
        teacher_crops=teacher_crops,
        rows=_checked_rows(folder, rows),
    )
    _check(settings, folder)
    options = BackendOptions(
        device=resolve_device(device),
        num_threads=default_num_threads() if num_threads is None else num_threads,
        max_batch_size=global_batch_size // world_size,
        hw_decoder=hw_decoder,
    )
    failures = FailurePolicy(on_bad_sample, skip_budget)
    return MultiCropLoader(folder, settings, options, failures, backend=backend, state=state)


def _checked_rows(folder: ShardFolder, rows: npt.ArrayLike | None) -> npt.NDArray[np.int64]:
    if rows is None:
        return np.arange(len(folder))
    chosen = np.sort(np.asarray(rows, np.int64).reshape(-1))
    if len(chosen) and (chosen[0] < 0 or chosen[-1] >= len(folder)):
        raise UserError(
            f"{folder.path}: rows from {chosen[0]} to {chosen[-1]} asked for, there are {len(folder)}. "
            "Choose rows of these shards."
        )
    if len(np.unique(chosen)) != len(chosen):
        raise UserError(f"{folder.path}: {len(chosen)} rows with repetitions. Name each row once.")
    return chosen


def _check(settings: _Settings, folder: ShardFolder) -> None:
    s = settings
    rank_positions(0, rank=s.rank, world_size=s.world_size, global_batch_size=s.global_batch_size)
    if s.steps_per_epoch == 0:
        raise UserError(
            f"{folder.path}: {len(s.rows)} rows, fewer than the global batch of {s.global_batch_size}. An epoch "
            "would have no step. Choose a smaller batch or pack more images."
        )
    if s.view_sets is not None and s.view_sets < 1:
        raise UserError(f"view_sets is {s.view_sets}. It must be at least 1, or None without a cache.")


def _position(state: Mapping[str, Any], identity: Mapping[str, Any]) -> tuple[int, int]:
    missing = [name for name in ("epoch", "step", *identity) if name not in state]
    if missing:
        raise UserError(
            f"resume: the loader's state lacks {', '.join(missing)}. It is of another program version. "
            "Start anew, or resume with the version that wrote it."
        )
    differing = [name for name in identity if state[name] != identity[name]]
    if differing:
        lines = "".join(f"\n  {n}: {state[n]} in the checkpoint, {identity[n]} now" for n in differing)
        raise UserError(
            f"resume: {len(differing)} setting(s) of the data stream differ from the checkpoint's:{lines}\n"
            "The stream would not be the one that was interrupted. Restore them, or start a new run."
        )
    return int(state["epoch"]), int(state["step"])


def _batches(
    folder: ShardFolder,
    settings: _Settings,
    options: BackendOptions,
    failures: FailurePolicy,
    backend: str,
    epoch: int,
    step: int,
) -> Iterator[Ready[MultiCropBatch]]:
    """Run the whole stream; everything in here happens in the feeder thread."""
    stream = _Stream(folder, settings, failures, options.device)
    work = training_work(settings.augmentation, teacher_crops=settings.teacher_crops)
    with folder:
        yield from run(backend, work, options, stream.jobs(epoch, step), stream.repair, stream.assemble)


class _Stream:
    """Makes jobs of rows and batches of crops, for one rank."""

    def __init__(self, folder: ShardFolder, settings: _Settings, failures: FailurePolicy, device: torch.device) -> None:
        self._folder = folder
        self._settings = settings
        self._failures = failures
        self._device = device
        self._orders: dict[int, npt.NDArray[np.int64]] = {}
        self._chunk = (-1, -1)
        self._chunk_plans: list[_StepPlan] = []

    def jobs(self, first_epoch: int, first_step: int) -> Iterator[Job]:
        s = self._settings
        share = s.global_batch_size // s.world_size
        for epoch in itertools.count(first_epoch):
            order = self._order(epoch)
            used = order[: s.steps_per_epoch * s.global_batch_size]
            mine = used.reshape(s.steps_per_epoch, s.world_size, share)[:, s.rank].reshape(-1)
            ahead = Readahead(self._folder, mine, _READAHEAD_ROWS // s.world_size)
            for step in range(first_step if epoch == first_epoch else 0, s.steps_per_epoch):
                ahead.step(step * share, share)
                yield self._job(epoch, step)

    def repair(self, job: Job, error: BadSampleError) -> Job:
        reasons = {int(job.rows[i]): reason for i, reason in error.reasons.items()}
        self._failures.report(self._folder, reasons)
        return self._job(job.epoch, job.step)

    def assemble(self, job: Job, crops: Crops) -> MultiCropBatch:
        s, index, rows = self._settings, self._folder.index, job.rows
        self._failures.count(len(rows), job.num_replaced)
        uids = index.uid[rows]
        masks = job.masks
        assert crops.global_crops is not None and crops.local_crops is not None and masks is not None
        teacher = crops.global_crops if s.augmentation.teacher_photometric else crops.clean_crops
        plan, sizes = job.request.plan, job.request.sizes
        return MultiCropBatch(
            rows=rows,
            uids=uids,
            image_crcs=index.crc32c[rows],
            view_set=s.view_set(job.epoch),
            epoch=job.epoch,
            global_crops=crops.global_crops,
            local_crops=crops.local_crops,
            teacher_crops=teacher if s.teacher_crops else None,
            masks=to_device(masks, self._device),
            masked_indices=to_device(np.flatnonzero(masks), self._device),
            labels=to_device(index.label[rows].astype(np.int64), self._device),
            global_crops_spec=global_crops_spec(plan, sizes, s.augmentation.num_global_crops),
        )

    def _job(self, epoch: int, step: int) -> Job:
        order, positions = self._order(epoch), self._positions(step)
        rows = order[positions.start : positions.stop]
        bad = [i for i, row in enumerate(rows.tolist()) if row in self._failures.reasons]
        if bad:
            rows = rows.copy()
            for i in bad:
                rows[i] = self._substitute(order, positions[i])
            plan, masks = self._plan(rows, epoch, num_steps=1)[0]
        else:
            plan, masks = self._planned(epoch, step)
        request = CropRequest(self._folder.jpegs(rows), self._folder.sizes(rows), plan)
        return Job(rows, request, epoch, step, masks, len(bad))

    def _positions(self, step: int) -> range:
        s = self._settings
        return rank_positions(step, rank=s.rank, world_size=s.world_size, global_batch_size=s.global_batch_size)

    def _planned(self, epoch: int, step: int) -> _StepPlan:
        """Plan and masks of a step, made along with those of its neighbours."""
        first = step - step % _PLANNED_STEPS
        if self._chunk != (epoch, first):
            steps = range(first, min(first + _PLANNED_STEPS, self._settings.steps_per_epoch))
            rows = self._order(epoch)[np.concatenate([self._positions(i) for i in steps])]
            self._chunk, self._chunk_plans = (epoch, first), self._plan(rows, epoch, num_steps=len(steps))
        return self._chunk_plans[step - first]

    def _plan(self, rows: npt.NDArray[np.int64], epoch: int, *, num_steps: int) -> list[_StepPlan]:
        s, uids = self._settings, self._folder.index.uid[rows]
        shared: dict[str, Any] = {"epoch": epoch, "seed": s.seed, "augmentation": s.augmentation}
        plan = crop_plan(uids, self._folder.sizes(rows), view_set=s.view_set(epoch), **shared)
        masks, _ = block_masks(uids, **shared)
        by_crop = masks.reshape(-1, len(rows), masks.shape[-1])  # [g, images, patches]
        share = len(rows) // num_steps
        images = (slice(i * share, (i + 1) * share) for i in range(num_steps))
        return [(plan[part], by_crop[:, part].reshape(-1, masks.shape[-1])) for part in images]

    def _substitute(self, order: npt.NDArray[np.int64], position: int) -> int:
        """The good row half an epoch away: the same for every world size, and of another batch if there is one."""
        n = len(order)
        for distance in range(n):
            row = int(order[(position + n // 2 + distance) % n])
            if row not in self._failures.reasons:
                return row
        raise UserError(
            f"{self._folder.path}: all {n} rows are bad. There is nothing to train on. "
            "Run `make verify-shards` and pack the shards again."
        )

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        order = self._orders.get(epoch)
        if order is None:
            s = self._settings
            order = s.rows[epoch_order(len(s.rows), seed=s.seed, epoch=epoch)]
            # A job in flight may still be of the epoch before.
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1} | {epoch: order}
        return order
