"""From rows to crops in the feeder thread: requests in flight, repair of bad samples, the GPU's side stream."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.backend import open_backend
from pipeline.crops import BackendOptions, BadSampleError, CropBackend, CropRequest, Crops, CropWork

B = TypeVar("B")


@dataclass(frozen=True)
class Job:
    """A batch on its way.

    Attributes:
        rows: rows of the shard index, int64 [n].
        request: their bytes, sizes and plan.
        epoch: 0 outside of training.
        step: step of the epoch.
        num_replaced: rows that stand in for bad ones.
    """

    rows: npt.NDArray[np.int64]
    request: CropRequest
    epoch: int = 0
    step: int = 0
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
                tensor.record_stream(current)
    return ready.batch


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Bring a small array to the device without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
