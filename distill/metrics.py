"""The run's log: metrics.jsonl is the truth, train.log what the terminal shows, TensorBoard if asked for."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError
from common.files import explain_disk_errors, write_atomic
from distill.config import RuntimeConfig
from distill.runtime import Ranks
from distill.step import METRIC_NAMES, METRICS

PHASES = ("data_wait", "targets", "student", "optimizer")
TEXT_LOG = "train.log"
_TIME = "%Y-%m-%d %H:%M:%S"
_STALL_LIMIT = 0.03
_FASTER_LOADER = "raise --num_threads, use a local disk, or decode with DALI on the GPU."
_ADVICE = {
    "data_wait": f"The loader is the limit: {_FASTER_LOADER}",
    "targets": "The teacher's outputs are the limit: build a cache with `make cache`, or put it on a faster disk.",
    "student": "The student's forward and backward pass is the limit, as it should be.",
    "optimizer": "The optimizer is the limit: raise --batch_size_per_gpu.",
}


class PhaseClock:
    """Splits a step's time into phases: on a GPU by events on the compute stream, on a CPU by the host clock."""

    def __init__(self, device: torch.device, phases: Sequence[str] = PHASES) -> None:
        self._phases = phases
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """Say that `phase` begins now; "" ends the last one."""
        if not self._on_gpu:
            self._marks.append((phase, time.perf_counter()))
            return
        # The host runs ahead of the device: its clock would time the launches.
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((phase, event))

    def read(self) -> dict[str, float]:
        """Return seconds by phase since the last call; call it when the device is idle."""
        seconds = dict.fromkeys(self._phases, 0.0)
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if phase:
                seconds[phase] += start.elapsed_time(end) / 1000 if self._on_gpu else end - start
        self._marks.clear()
        return seconds


class MetricsLog:
    """Accumulates device tensors and reads them once every `log_every` steps.

    `metrics.jsonl` holds one object per logged step: the mean of every term since the last one, over all
    ranks. Lines of steps beyond `first_step`, left by a run that was cut off, are dropped at the start.
    `train.log` gets what is said, with the time, and is never cut.
    """

    def __init__(
        self, run_dir: Path, config: RuntimeConfig, ranks: Ranks, *, first_step: int, total_steps: int
    ) -> None:
        self._ranks = ranks
        self._log_every = config.log_every
        self._total_steps = total_steps
        self._path, self._text_path = run_dir / "metrics.jsonl", run_dir / TEXT_LOG
        self._sum = torch.zeros(len(METRICS) + 1, device=ranks.device)
        self._count = 0
        self._images = 0
        self._since = time.perf_counter()
        self.phases = PhaseClock(ranks.device)
        self._phase_totals = dict.fromkeys(PHASES, 0.0)
        self._seconds = 0.0
        self._images_total = 0
        self._error: UserError | None = None
        self._writer: Any = None
        self._bar: tqdm[Any] | None = None
        if ranks.is_main:
            self._drop_lines_from(first_step)
            if config.tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # seconds

                self._writer = SummaryWriter(run_dir / "tensorboard")
            if sys.stderr.isatty():
                self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    @property
    def failed(self) -> bool:
        """Whether a line of this rank could not be written."""
        return self._error is not None

    def begin(self) -> None:
        """Count time from here on: what came before (loading, compiling, the first batch) was start-up."""
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        self.phases.read()
        self._since = time.perf_counter()
        if self._bar is not None:
            self._bar.unpause()

    def add(self, metrics: Tensor, grad_norm: Tensor, *, images: int) -> None:
        """Add one step's metrics, still on the device.

        Args:
            metrics: `METRICS` of the step.
            grad_norm: norm before clipping, 0-d.
            images: images of the global batch.
        """
        self._sum += torch.cat([metrics, grad_norm.reshape(1)])
        self._count += 1
        self._images += images
        if self._bar is not None:
            self._bar.update()

    def due(self, step: int) -> bool:
        """Return whether `flush` is due after `step` steps."""
        return step % self._log_every == 0 or step == self._total_steps

    def flush(self, step: int, **fields: float) -> None:
        """Read the accumulated metrics, write one line, start anew. All ranks call it together."""
        if self._count == 0:
            return
        mean = self._sum / self._count
        if self._ranks.world_size > 1:
            dist.all_reduce(mean)
            mean /= self._ranks.world_size
        values = mean.tolist()  # the one host sync
        seconds = time.perf_counter() - self._since
        phases = self.phases.read()
        line = {"step": step, **dict(zip((*METRIC_NAMES, "grad_norm"), values, strict=True)), **fields}
        line["images_per_second"] = self._images / seconds
        line["step_time"] = seconds / self._count
        line["data_wait"] = phases["data_wait"] / seconds
        line |= {f"{name}_share": phases[name] / seconds for name in PHASES[1:]}
        for name in PHASES:
            self._phase_totals[name] += phases[name]
        self._seconds += seconds
        self._images_total += self._images
        self._sum.zero_()
        self._count = self._images = 0
        self._since = time.perf_counter()
        if self._ranks.is_main:
            self._write(line, fields)

    def event(self, step: int, **fields: Any) -> None:
        """Write a line of its own (an evaluation, gradient norms by term); main rank only."""
        if self._ranks.is_main:
            self._append({"step": step, **fields})

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of an evaluation or a checkpoint out of the speed."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def say(self, text: str) -> None:
        """Print a line above the progress bar and keep it in train.log; main rank only."""
        if self._ranks.is_main:
            tqdm.write(text, file=sys.stderr)
            self._keep(text)

    def summary(self) -> str:
        """Return where the time since `begin` went and what to change, in two lines."""
        if not self._seconds:
            return "no step was taken"
        shares = {name: total / self._seconds for name, total in self._phase_totals.items()}
        listed = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        speed = f"{self._images_total / self._seconds:.1f} images/s over {self._images_total} images"
        largest = max(shares, key=lambda name: shares[name])
        advice = _ADVICE[largest]
        if largest != "data_wait" and shares["data_wait"] > _STALL_LIMIT:
            advice += f" {shares['data_wait']:.1%} go on waiting for the loader: {_FASTER_LOADER}"
        return f"{speed}; time: {listed}\n{advice}"

    def close(self) -> None:
        """Close bar and writers, at the very end; UserError where a line could not be written (disk full, say)."""
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            with self._remembering_errors(self._path):
                self._writer.close()
        if self._error is not None:
            raise self._error

    def _write(self, line: dict[str, Any], fields: Iterable[str]) -> None:
        self._append(line)
        # Terms without a weight are 0 and left out.
        names = [metric.name for metric in METRICS if metric.shown and line[metric.name]]
        names += [*fields, "images_per_second", "data_wait"]
        shown = "  ".join(f"{name} {line[name]:.4g}" for name in names)
        eta = (self._total_steps - line["step"]) * line["step_time"]
        text = f"step {line['step']}/{self._total_steps}  eta {eta:.0f} s  {shown}"
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._keep(text)
        else:
            self.say(text)

    def _keep(self, text: str) -> None:
        self._write_line(self._text_path, f"{time.strftime(_TIME)} {text}")

    def _write_line(self, path: Path, text: str) -> None:
        with self._remembering_errors(path), path.open("a") as file:
            file.write(text + "\n")

    @contextlib.contextmanager
    def _remembering_errors(self, path: Path) -> Iterator[None]:
        try:
            with explain_disk_errors(path):
                yield
        except UserError as error:  # raised by `close`, when all ranks have stopped at the same step
            self._error = self._error or error

    def _append(self, line: dict[str, Any]) -> None:
        self._write_line(self._path, json.dumps(line))
        if self._writer is not None:
            with self._remembering_errors(self._path):
                for name, value in line.items():
                    if isinstance(value, (int, float)) and name != "step":
                        self._writer.add_scalar(name, value, line["step"])

    def _drop_lines_from(self, first_step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for text in self._path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # the last line of a run that was killed
                continue
            if line["step"] <= first_step:
                kept.append(text)
        write_atomic(self._path, "".join(text + "\n" for text in kept).encode())


@contextlib.contextmanager
def kept_messages(run_dir: Path) -> Iterator[None]:
    """Keep in train.log what other modules log, and the error that ends the block."""
    handler = _Appending(run_dir / TEXT_LOG)
    logging.getLogger().addHandler(handler)
    try:
        yield
    except BaseException as error:
        told = isinstance(error, (UserError, KeyboardInterrupt))
        text = f"error: {error}" if isinstance(error, UserError) else repr(error)
        handler.handle(logging.makeLogRecord({"msg": text, "exc_info": None if told else sys.exc_info()}))
        raise
    finally:
        logging.getLogger().removeHandler(handler)


class _Appending(logging.Handler):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", _TIME))

    def emit(self, record: logging.LogRecord) -> None:
        # A full disk is told by the next line of the log itself, which ends every rank.
        with contextlib.suppress(OSError), self._path.open("a") as file:
            file.write(self.format(record) + "\n")
