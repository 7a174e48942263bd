"""From rows to crops in the feeder thread: readahead, requests in flight, bad samples, the GPU's side stream."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.errors import UserError
from pipeline.backend import open_backend
from pipeline.crops import BackendOptions, BadSampleError, CropBackend, CropRequest, Crops, CropWork
from shards.folder import ShardFolder

B = TypeVar("B")


@dataclass(frozen=True)
class Job:
    """A batch on its way.

    Attributes:
        rows: rows of the shard index, int64 [n].
        request: their bytes, sizes and plan.
        epoch: 0 outside of training.
        step: step of the epoch.
        masks: of its patches, bool [g*n, patches], where there are any.
        num_replaced: rows that stand in for bad ones.
    """

    rows: npt.NDArray[np.int64]
    request: CropRequest
    epoch: int = 0
    step: int = 0
    masks: npt.NDArray[np.bool_] | None = None
    num_replaced: int = 0


@dataclass(frozen=True)
class Ready(Generic[B]):
    """A finished batch, the job it came from, and the event after which its tensors may be read."""

    batch: B
    job: Job
    event: torch.cuda.Event | None


def crop_jobs(
    jobs: Iterator[Job], backend: CropBackend, repair: Callable[[Job, BadSampleError], Job]
) -> Iterator[tuple[Job, Crops]]:
    """Crop jobs in order, keeping `backend.depth` in flight.

    Args:
        jobs: what to crop.
        backend: what crops them.
        repair: called with a job and its bad samples; returns the job to do in its place, or raises.
    """
    pending: deque[Job] = deque()
    more = True
    while True:
        while more and len(pending) < backend.depth:
            job = next(jobs, None)
            if job is None:
                more = False
            else:
                backend.submit(job.request)
                pending.append(job)
        if not pending:
            return
        try:
            crops = backend.collect()
        except BadSampleError as error:
            pending[0] = repair(pending[0], error)
            backend.reset()
            for job in pending:
                backend.submit(job.request)
            continue
        yield pending.popleft(), crops


def run(
    name: str,
    work: CropWork,
    options: BackendOptions,
    jobs: Iterator[Job],
    repair: Callable[[Job, BadSampleError], Job],
    assemble: Callable[[Job, Crops], B],
) -> Iterator[Ready[B]]:
    """Open a backend and yield finished batches; on a GPU all of it runs on a stream of its own."""
    device = options.device
    with contextlib.ExitStack() as stack:
        stream = None
        if device.type == "cuda":
            stream = torch.cuda.Stream(device)
            stack.enter_context(torch.cuda.device(device))
            stack.enter_context(torch.cuda.stream(stream))
        backend = open_backend(name, work, options)
        stack.callback(backend.close)
        for job, crops in crop_jobs(jobs, backend, repair):
            batch = assemble(job, crops)
            event = None
            if stream is not None:
                # A batch that is handed on is finished: what the consumer waits for is then all in `data_wait`,
                # and the feeder cannot run ahead of the device. The backend has the next request meanwhile.
                event = torch.cuda.Event(blocking=True)
                event.record(stream)
                event.synchronize()
            yield Ready(batch, job, event)


def receive(ready: Ready[B]) -> B:
    """Make the current stream wait for a batch, and keep its memory until that stream has used it."""
    if ready.event is not None:
        batch: Any = ready.batch
        tensors = [t for t in (getattr(batch, f.name) for f in fields(batch)) if isinstance(t, Tensor)]
        current = torch.cuda.current_stream(next(t.device for t in tensors if t.is_cuda))
        current.wait_event(ready.event)
        for tensor in tensors:
            if tensor.is_cuda:
                # Allocated on the feeder's stream, which could else reuse the memory while this one reads it.
                tensor.record_stream(current)
    return ready.batch


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Bring a small array to the device without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


POLICIES = ("raise", "skip")

# Samples for which the budget is granted in advance: a few early ones are no verdict on a data set.
PROBATION = 10_000
_MAX_NAMED = 10
_log = logging.getLogger("pipeline")


@dataclass
class FailurePolicy:
    """Counts bad samples and decides whether to go on.

    Attributes:
        mode: `raise` stops at the first bad sample; `skip` puts another row in its place.
        budget: share of the samples read that may be bad under `skip`; of the first `PROBATION` at once.
        reasons: the bad rows met so far and why.
        num_replaced: samples replaced so far; a row counts once for each time it was due.
        num_samples: samples handed out so far.
    """

    mode: str = "raise"
    budget: float = 0.001
    reasons: dict[int, str] = field(default_factory=dict)
    num_replaced: int = 0
    num_samples: int = 0

    def __post_init__(self) -> None:
        if self.mode not in POLICIES:
            raise UserError(f"policy: {self.mode!r} is unknown. There are: {', '.join(POLICIES)}.")
        if not 0 <= self.budget <= 1:
            raise UserError(f"skip budget {self.budget}: it is a share from 0 to 1. Change --skip_budget.")

    def report(self, folder: ShardFolder, reasons: Mapping[int, str]) -> None:
        """Take note of bad rows.

        Raises:
            UserError: the policy is `raise`; the message names every row by shard, row and key.
        """
        named = [f"{folder.describe(row)}: {reason}" for row, reason in reasons.items()]
        if self.mode == "raise":
            more = f"\n  and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
            raise UserError(
                f"{len(named)} sample(s) cannot be decoded:\n  "
                + "\n  ".join(named[:_MAX_NAMED])
                + more
                + "\nRun `make verify-shards` and pack the shards again, or go on without them by policy skip."
            )
        for row, reason in reasons.items():
            if row not in self.reasons:
                self.reasons[row] = reason
                _log.warning("%s: %s; another row takes its place", folder.describe(row), reason)

    def count(self, num_samples: int, num_replaced: int) -> None:
        """Count a batch that is handed out.

        Raises:
            UserError: more samples were replaced than the budget allows.
        """
        self.num_samples += num_samples
        self.num_replaced += num_replaced
        allowed = self.budget * max(self.num_samples, PROBATION)
        if self.num_replaced > allowed:
            raise UserError(
                f"{self.num_replaced} of {self.num_samples} samples could not be decoded, the skip budget "
                f"allows {allowed:.1f} ({self.budget:g} of the samples, {PROBATION} granted in advance). "
                "Run `make verify-shards` and pack the shards again, or raise skip_budget."
            )

    def summary(self) -> str:
        """One line for the end of a run."""
        return f"{self.num_replaced} of {self.num_samples} samples replaced, {len(self.reasons)} distinct rows bad"


# Pieces of a step: catching up after a start must not hold up the first batches.
_CATCH_UP = 4


class Readahead:
    """Stays up to one window of a rank's rows ahead of what it reads."""

    def __init__(self, folder: ShardFolder, rows: npt.NDArray[np.int64], window: int) -> None:
        """Plan the advice of one epoch.

        Args:
            folder: where advice goes.
            rows: what this rank will read, in that order.
            window: rows to stay ahead; within a window they are asked for in the order of the disk.
        """
        self._folder = folder
        self._window = max(1, window)
        pieces = [np.sort(rows[i : i + self._window]) for i in range(0, len(rows), self._window)]
        self._rows = np.concatenate(pieces) if pieces else rows
        self._position = 0

    def step(self, consumed: int, batch: int) -> None:
        """Advise on some more rows.

        Args:
            consumed: rows read so far.
            batch: rows of a step.
        """
        start = max(self._position, consumed)
        end = min(consumed + self._window, start + _CATCH_UP * batch, len(self._rows))
        if end > start:
            self._folder.advise(self._rows[start:end])
            self._position = end
