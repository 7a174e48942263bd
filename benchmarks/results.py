"""How rows are measured, their table on the terminal, their place in benchmarks/results/, and what they belong to."""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

_PACKAGES = (
    "numpy", "torch", "torchvision", "nvidia-dali-cuda130", "pillow", "opencv-python-headless", "simplejpeg",
    "webdataset", "zarr",
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """One row: a name, a unit, the figure of every round, and what else to know."""

    name: str
    unit: str
    figures: tuple[float, ...]
    note: str = ""

    @property
    def median(self) -> float:
        """The middle figure."""
        return statistics.median(self.figures)


@dataclass(frozen=True)
class Row:
    """What runs, on how many samples; the figure is a rate a core-second, or a cost in microseconds a sample."""

    name: str
    samples: int
    run: Callable[[], object]
    note: str = ""
    cost: bool = False
    clean_up: Callable[[], object] = lambda: None
    """Called after each run, off the clock."""

    @property
    def unit(self) -> str:
        """Unit of the figure."""
        return "us/sample" if self.cost else "images/core-s"

    def timed(self) -> float:
        """Run once and return the figure; the clock is this process's CPU time, all threads."""
        start = time.process_time()
        self.run()
        seconds = time.process_time() - start
        self.clean_up()
        return 1e6 * seconds / self.samples if self.cost else self.samples / seconds


def measure(rows: Sequence[Row], rounds: int) -> list[Measurement]:
    """Run every row once to warm up, then once a round, the order rotated by one."""
    for row in rows:
        row.timed()
    figures: list[list[float]] = [[] for _ in rows]
    for number in range(rounds):
        for k in range(len(rows)):
            i = (k + number) % len(rows)
            figures[i].append(rows[i].timed())
        print(f"round {number + 1} of {rounds}", flush=True)
    return [Measurement(r.name, r.unit, tuple(f), r.note) for r, f in zip(rows, figures, strict=True)]


def parser_of(name: str, description: str | None, *, images: int) -> argparse.ArgumentParser:
    """The flags of `benchmarks.bench_NAME`; rows go to `results/NAME.csv`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.bench_{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="few images and rounds: does it run?")
    parser.add_argument("--images", type=int, default=images, help="images of the data set")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / f"{name}.csv")
    return parser


def print_table(rows: Sequence[Measurement]) -> None:
    """Print medians with their spread."""
    width = max(len(row.name) for row in rows)
    print(f"{hardware()}\n{'':{width}}  {'median':>10}  {'min':>10}  {'max':>10}")
    for row in rows:
        low, high = min(row.figures), max(row.figures)
        figures = "  ".join(f"{_short(x):>10}" for x in (row.median, low, high))
        print(f"{row.name:{width}}  {figures}  {row.unit}{f'  ({row.note})' if row.note else ''}")


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def append_measurements(path: Path, rows: Sequence[Measurement]) -> None:
    """Append the rows to a CSV file, with hardware, versions and commit."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"time": now, "commit": commit(), "hardware": hardware(), "versions": versions()}
    append_rows(
        path,
        [
            about
            | {"row": row.name, "unit": row.unit, "median": row.median, "min": min(row.figures)}
            | {"max": max(row.figures), "rounds": len(row.figures), "note": row.note}
            for row in rows
        ],
    )


def append_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Append rows of one set of columns to a CSV file, with a header if it is new; floats to six digits."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def hardware() -> str:
    """The processor, the cores that this process may use, and the GPU if there is one."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{processor()}, {len(os.sched_getaffinity(0))} cores, {gpu}"


def processor() -> str:
    """The processor's own name for itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux on x86: the plain name will do
        return platform.processor() or platform.machine()


def versions() -> str:
    """Python and the packages that figures depend on."""
    found = [f"python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} absent")
    return "; ".join(found)


def commit() -> str:
    """The commit, with a mark where the code differs from it."""
    root = Path(__file__).parents[1]
    done = [
        subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
        for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "*.py"])
    ]
    return f"{done[0] or 'unknown'}{'+changes' if done[1] else ''}"
