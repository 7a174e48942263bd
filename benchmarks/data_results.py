"""What a data benchmark measured: its table on the terminal and its rows in benchmarks/results/data.csv."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

_PACKAGES = (
    "numpy", "torch", "torchvision", "nvidia-dali-cuda130", "pillow", "opencv-python-headless", "simplejpeg",
    "webdataset",
)  # fmt: skip
# What a figure depends on: changes in it that are not committed are shown beside the commit.
_MEASURED = ("../pipeline", "../shards", "bench_data.py", "data_rows.py", "data_gpu.py", "peers.py")


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


def append_rows(path: Path, rows: Sequence[Measurement]) -> None:
    """Append the rows to a CSV file, with hardware, versions and commit."""
    columns = [
        "time", "commit", "hardware", "versions", "row", "unit", "median", "min", "max", "rounds", "note",
    ]  # fmt: skip
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(columns)
        for row in rows:
            figures = [f"{x:.6g}" for x in (row.median, min(row.figures), max(row.figures))]
            writer.writerow(
                [now, _commit(), hardware(), _versions(), row.name, row.unit, *figures, len(row.figures), row.note]
            )


def hardware() -> str:
    """The processor, the cores that this process may use, and the GPU if there is one."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux on x86: the plain name will do
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{name}, {cores} cores, {gpu}"


def _versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} absent")
    return "; ".join(found)


def _commit() -> str:
    folder = Path(__file__).parent
    done = [
        subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=False).stdout.strip()
        for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", *_MEASURED])
    ]
    return f"{done[0] or 'unknown'}{'+changes' if done[1] else ''}"
