"""The data path against its peers: images per core-second on a CPU, images per second and memory on a GPU.

Every row is measured in every round, the order rotated by one, so that a machine's moods fall on all alike; the
figure is the median over rounds. On the CPU the clock is the process's own CPU time, all threads: it does not
count the time that other programs take, which a wall clock would on a shared machine.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.data_gpu import gpu_rows
from benchmarks.data_rows import BATCH, Row, busy_rows, cpu_rows
from benchmarks.natural_images import write_images
from benchmarks.results import Measurement, append_measurements, print_table
from shards.pack import pack

# Most of ImageNet is 500 x 375 or 375 x 500.
SIZES = [(375, 500), (375, 500), (375, 500), (500, 375), (333, 500), (500, 334), (480, 640)]

_RATIOS = [
    ("full 2x224 + 8x96: cpu", "full 2x224 + 8x96: torchvision v2, uint8"),
    ("full 2x224 + 8x96: cpu", "full 2x224 + 8x96: torchvision v2, as published"),
    ("full 2x224 + 8x96: cpu", "full 2x224 + 8x96: dali"),
    ("full 2x224 + 8x96: cpu", "full 2x224 + 8x96: Pillow"),
    ("full 2x224 + 8x96: dali", "full 2x224 + 8x96: torchvision v2, uint8"),
    ("full 2x224 + 8x96: torch", "full 2x224 + 8x96: torchvision v2, uint8"),
    ("read: copies by pread, random order", "read: webdataset iterator"),
]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, append the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_data", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few images and rounds: does it run?")
    parser.add_argument("--images", type=int, default=128, help="images of the data set")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shards", type=Path, help="measure on these shards instead of made images")
    parser.add_argument("--only", choices=("cpu", "gpu"), help="leave the other's rows out")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "data.csv")
    options = parser.parse_args(arguments)
    if options.only == "gpu" and not torch.cuda.is_available():
        parser.error("--only gpu: torch sees no CUDA device")
    images, rounds = (BATCH, 2) if options.quick else (options.images, options.rounds)
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        shards = options.shards or _made_shards(Path(folder), images)
        if options.only != "gpu":
            measured = measure(cpu_rows(shards, images, stack, quick=options.quick), rounds)
            measured += busy_rows(shards, rounds)
            _report(options.results, measured)
            _print_ratios(measured)
        if options.only != "cpu" and torch.cuda.is_available():
            _report(options.results, gpu_rows(shards, quick=options.quick))


def _report(results: Path, measured: list[Measurement]) -> None:
    print_table(measured)
    append_measurements(results, measured)
    print(f"appended {len(measured)} rows to {results}", flush=True)


def _made_shards(folder: Path, images: int) -> Path:
    write_images(folder / "images", SIZES, images)
    pack(folder / "images", folder / "shards", workers=1, progress=False)
    return folder / "shards"


def measure(rows: list[Row], rounds: int) -> list[Measurement]:
    """Run every row once to warm up, then once a round."""
    for row in rows:
        row.run()
    figures: list[list[float]] = [[] for _ in rows]
    for number in range(rounds):
        for i in [(k + number) % len(rows) for k in range(len(rows))]:
            start = time.process_time()
            rows[i].run()
            figures[i].append(rows[i].figure(time.process_time() - start))
        print(f"round {number + 1} of {rounds}", flush=True)
    return [Measurement(r.name, r.unit, tuple(f), r.note) for r, f in zip(rows, figures, strict=True)]


def _print_ratios(measured: list[Measurement]) -> None:
    found = {row.name: row for row in measured}
    for name, peer in _RATIOS:
        if name in found and peer in found:
            pairs = zip(found[name].figures, found[peer].figures, strict=True)
            ratios = [ours / theirs for ours, theirs in pairs]
            median = found[name].median / found[peer].median
            print(f"{name} over {peer}: {median:.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
