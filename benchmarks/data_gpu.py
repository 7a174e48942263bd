"""The rows of the data benchmark that need a GPU: rate against threads and decoder, memory, overlap."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.results import Measurement
from pipeline import dali
from pipeline.augmentation import named_augmentation
from pipeline.backend import usable_cores
from pipeline.loader import MultiCropLoader, open_loader
from shards.manifest import load_manifest

_BATCH = 64
_ROUNDS = 3
_MEMORY_BATCHES = 1000
_MEMORY_WARM_UP = 100
_MATRIX = 8192
_NOTE = f"batches of {_BATCH} (fewer if there are fewer images), uint8"


def gpu_rows(shards: Path, *, quick: bool) -> list[Measurement]:
    """Measure every GPU row; the loader runs alone but for the rows of overlap."""
    batches = 5 if quick else 50
    rows = [*_thread_rows(shards, batches), _memory_row(shards, 50 if quick else _MEMORY_BATCHES)]
    return rows + _overlap_rows(shards, batches)


def _open(shards: Path, backend: str, threads: int, hw_decoder: bool = False) -> MultiCropLoader:
    batch = min(_BATCH, load_manifest(shards).num_rows)
    return open_loader(
        shards, device="cuda", backend=backend, global_batch_size=batch, seed=0,
        augmentation=named_augmentation("dino"), num_threads=threads, hw_decoder=hw_decoder, teacher_crops=False,
    )  # fmt: skip


def _rate(loader: MultiCropLoader, batches: int) -> float:
    """Images a second, the device synchronised at both ends."""
    for _ in range(5):
        next(loader)
    torch.cuda.synchronize()
    start = time.perf_counter()
    images = sum(len(next(loader).rows) for _ in range(batches))
    torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def _thread_rows(shards: Path, batches: int) -> Iterator[Measurement]:
    settings = [("cpu", usable_cores(), False)] + [("torch", threads, False) for threads in _thread_counts()]
    if dali.missing_reason() is None:
        settings += [("dali", threads, load) for load in (False, True) for threads in _thread_counts()]
    figures: dict[tuple[str, int, bool], list[float]] = {key: [] for key in settings}
    for _ in range(_ROUNDS):
        for backend, threads, load in settings:
            with _open(shards, backend, threads, load) as loader:
                figures[backend, threads, load].append(_rate(loader, batches))
    for (backend, threads, load), found in figures.items():
        decoder = f", hardware decoder {'on' if load else 'off'}" if backend == "dali" else ""
        name = f"gpu full 2x224 + 8x96: {backend}, {threads} threads{decoder}"
        yield Measurement(name, "images/s", tuple(found), _NOTE)


def _thread_counts() -> list[int]:
    return [n for n in (1, 2, 4, 8, 16) if n <= usable_cores()]


def _memory_row(shards: Path, batches: int) -> Measurement:
    """Memory of the device in use, by anyone, after each batch from the warm-up's end on."""
    backend = "torch" if dali.missing_reason() else "dali"
    used = []
    with _open(shards, backend, min(8, usable_cores())) as loader:
        for number in range(batches):
            next(loader)
            if number >= min(_MEMORY_WARM_UP, batches // 2):
                free, total = torch.cuda.mem_get_info()
                used.append((total - free) / 2**20)
    note = f"{used[-1] - used[0]:+.0f} MiB from batch {batches - len(used)} to the last; {_NOTE}"
    return Measurement(f"gpu memory over {batches} batches: {backend}", "MiB", tuple(used), note)


def _overlap_rows(shards: Path, batches: int) -> list[Measurement]:
    """A matrix product that fills the GPU, alone and beside the loader; and the loader alone and beside it."""
    backend = "torch" if dali.missing_reason() else "dali"
    threads = min(8, usable_cores())
    a = torch.randn(_MATRIX, _MATRIX, device="cuda", dtype=torch.bfloat16)
    products = 10

    def compute() -> None:
        for _ in range(products):
            a @ a

    alone, beside, rates = [], [], []
    for _ in range(_ROUNDS):
        alone.append(_milliseconds(compute, batches))
        with _open(shards, backend, threads) as loader:
            for _ in range(5):
                next(loader)
            images: list[int] = []

            def step(loader: MultiCropLoader = loader, images: list[int] = images) -> None:
                images.append(len(next(loader).rows))
                compute()

            start = time.perf_counter()
            beside.append(_milliseconds(step, batches))
            rates.append(sum(images) / (time.perf_counter() - start))
    note = f"{products} bf16 products of {_MATRIX} a step; {_NOTE}"
    return [
        Measurement("gpu compute step alone", "ms", tuple(alone), f"{products} bf16 products of {_MATRIX} a step"),
        Measurement(f"gpu compute step beside the loader: {backend}", "ms", tuple(beside), note),
        Measurement(f"gpu images beside the compute: {backend}", "images/s", tuple(rates), note),
    ]


def _milliseconds(step: Callable[[], None], steps: int) -> float:
    """Mean time of a step on the device's own clock."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    step()
    begin.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / steps
