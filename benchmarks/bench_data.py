"""The data path against its peers: images per core-second on a CPU, images per second and memory on a GPU.

Every row is measured in every round, the order rotated by one, so that a machine's moods fall on all alike; the
figure is the median over rounds. On the CPU the clock is the process's own CPU time, all threads: it does not
count the time that other programs take, which a wall clock would on a shared machine.
"""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from benchmarks.data_gpu import gpu_rows
from benchmarks.peers import PillowRecipe, TorchvisionRecipe
from benchmarks.results import Measurement, append_measurements, print_table
from benchmarks.synthetic import write_images
from pipeline import dali
from pipeline.augmentation import Augmentation, preset
from pipeline.backend import open_backend
from pipeline.cpu_crops import decode
from pipeline.crops import BackendOptions, CropRequest, training_work
from pipeline.feeder import Feeder
from pipeline.masks import block_masks
from pipeline.order import epoch_order
from pipeline.plan import crop_plan
from shards.folder import ShardFolder
from shards.pack import pack

BATCH = 32

_CPU = torch.device("cpu")
_IMAGENET_ROWS = 1_281_167
_READ_PASSES = 50
_PEER_NOTE = "one image at a time"
_DINOV3_NOTE = "DINOv3's transform as published, of torchvision's public transforms; one image at a time"
_DECODER_NOTE = "decoder of the cpu and torch backends; one image at a time"
_BUSY_SECONDS = 1.0
_Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """What runs, on how many samples; the figure is a rate a core-second, or a cost in microseconds a sample."""

    name: str
    samples: int
    run: Callable[[], object]
    note: str = ""
    cost: bool = False

    @property
    def unit(self) -> str:
        """Unit of the figure."""
        return "us/sample" if self.cost else "images/core-s"

    def figure(self, seconds: float) -> float:
        """The figure of a run that took so many seconds of CPU time."""
        return 1e6 * seconds / self.samples if self.cost else self.samples / seconds


def cpu_rows(shards: Path, images: int, stack: ExitStack, *, quick: bool) -> list[Row]:
    """All rows that need no GPU; what they hold open is closed with the stack."""
    folder = stack.enter_context(ShardFolder(shards))
    a = preset("dino")
    # Crops of one view with no photometrics.
    one = replace(a, num_global_crops=1, num_local_crops=0, blur_prob_global=(0.0,), solarize_prob_global=(0.0,))
    one = replace(one, jitter_prob=0.0, gray_prob=0.0)
    rows = np.arange(min(images, len(folder)))
    jpegs = [j.tobytes() for j in folder.jpegs(rows)]
    pillow = PillowRecipe(a)
    return [
        *_read_rows(folder, rows),
        *_decode_rows(folder, rows, jpegs),
        *_crop_rows("one crop", one, folder, rows, stack),
        _peer("one crop: Pillow", pillow.first_crop, jpegs, f"uint8; {_PEER_NOTE}"),
        *_crop_rows("full 2x224 + 8x96", a, folder, rows, stack),
        _peer("full 2x224 + 8x96: Pillow", pillow, jpegs, f"uint8; {_PEER_NOTE}"),
        *_torchvision_rows(a, jpegs),
        *_overhead_rows(folder, rows, a, quick=quick),
    ]


def _is_there(package: str) -> bool:
    """Whether a peer can be imported; says so if not, as its rows are then missing."""
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError, OSError) as error:  # of another torch than the one installed
        print(f"{package} cannot be imported ({error}): its rows are left out")
        return False
    return True


def _torchvision_rows(a: Augmentation, jpegs: list[bytes]) -> Iterator[Row]:
    if not _is_there("torchvision"):
        return
    from torchvision.io import decode_jpeg

    tensors = [torch.from_numpy(np.frombuffer(jpeg, np.uint8).copy()) for jpeg in jpegs]

    def decoded() -> None:
        for tensor in tensors:
            decode_jpeg(tensor)

    uint8, published = TorchvisionRecipe(a, normalise=False), TorchvisionRecipe(a, normalise=True)
    yield Row("decode: torchvision", len(jpegs), decoded, _PEER_NOTE)
    yield _peer("one crop: torchvision v2", uint8.first_crop, jpegs, f"uint8; {_PEER_NOTE}")
    yield _peer("full 2x224 + 8x96: torchvision v2, uint8", uint8, jpegs, f"uint8, not normalised; {_DINOV3_NOTE}")
    yield _peer("full 2x224 + 8x96: torchvision v2, as published", published, jpegs, f"float32; {_DINOV3_NOTE}")


def _peer(name: str, recipe: Callable[[bytes], object], jpegs: list[bytes], note: str = "") -> Row:
    def run() -> None:
        for jpeg in jpegs:
            recipe(jpeg)

    return Row(name, len(jpegs), run, note)


def _read_rows(folder: ShardFolder, rows: _Rows) -> Iterator[Row]:
    order = np.random.default_rng(0).permutation(rows)
    urls = [str(folder.path / shard.name) for shard in folder.manifest.shards]

    def copies() -> None:
        for _ in range(_READ_PASSES):
            folder.jpegs(order)

    checked = "from the page cache; checksums were checked in the warm-up"
    yield Row("read: copies by pread, random order", _READ_PASSES * len(rows), copies, checked)
    if not _is_there("webdataset"):
        return
    import webdataset

    def iterate() -> None:
        read = sum(len(sample["jpg"]) for sample in webdataset.WebDataset(urls, shardshuffle=False))
        assert read == int(folder.index.size.sum())

    yield Row("read: webdataset iterator", len(folder), iterate, "from the page cache; sequential, bytes not decoded")


def _decode_rows(folder: ShardFolder, rows: _Rows, jpegs: list[bytes]) -> Iterator[Row]:
    views, sizes = folder.jpegs(rows), folder.sizes(rows)

    def strict() -> None:
        for view, size in zip(views, sizes, strict=True):
            decode(view, size)

    yield _peer("decode: Pillow", _by_pillow, jpegs, _PEER_NOTE)
    yield Row("decode: simplejpeg, strict", len(rows), strict, _DECODER_NOTE)
    if dali.missing_reason() is None:
        pipe = dali.decode_pipeline(BackendOptions(_CPU, 1, BATCH))

        def by_dali() -> None:
            for start in range(0, len(views), BATCH):
                pipe.run(jpegs=views[start : start + BATCH])

        yield Row("decode: dali", len(rows), by_dali, f"batches of {BATCH}, 1 thread")


def _by_pillow(jpeg: bytes) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def _crop_rows(name: str, a: Augmentation, folder: ShardFolder, rows: _Rows, stack: ExitStack) -> Iterator[Row]:
    """Decode and crop with each backend, one thread, plan included."""
    names = ["cpu", "torch"] if dali.missing_reason() else ["dali", "cpu", "torch"]
    for backend_name in names:
        backend = open_backend(backend_name, training_work(a, teacher_crops=False), BackendOptions(_CPU, 1, BATCH))
        stack.callback(backend.close)

        def run(backend: Any = backend) -> None:
            for start in range(0, len(rows), BATCH):
                backend.submit(_request(folder, rows[start : start + BATCH], a))
                backend.collect()

        yield Row(f"{name}: {backend_name}", len(rows), run, f"uint8; batches of {BATCH}, 1 thread")


def _request(folder: ShardFolder, rows: _Rows, a: Augmentation) -> CropRequest:
    sizes = folder.sizes(rows)
    plan = crop_plan(folder.index.uid[rows], sizes, view_set=0, epoch=0, seed=0, augmentation=a)
    return CropRequest(folder.jpegs(rows), sizes, plan)


def _overhead_rows(folder: ShardFolder, rows: _Rows, a: Augmentation, *, quick: bool) -> Iterator[Row]:
    chosen = np.resize(rows, 64)
    uids, sizes, repeat = folder.index.uid[chosen], folder.sizes(chosen), 5 if quick else 50
    count = repeat * len(chosen)

    def plans() -> None:
        for epoch in range(repeat):
            crop_plan(uids, sizes, view_set=0, epoch=epoch, seed=0, augmentation=a)

    def masks() -> None:
        for epoch in range(repeat):
            block_masks(uids, epoch=epoch, seed=0, augmentation=a)

    note = f"batches of {len(chosen)}"
    yield Row("feeding: crop plan, 10 views", count, plans, note, cost=True)
    yield Row("feeding: block masks", count, masks, note, cost=True)
    if dali.missing_reason() is None:
        feed = _feed(folder, chosen, a, repeat)
        yield Row("feeding: read, plan, DALI's external source", count, feed, note, cost=True)
    rows_of_epoch = _IMAGENET_ROWS // 10 if quick else _IMAGENET_ROWS
    note = f"{rows_of_epoch} rows"
    yield Row("epoch order", rows_of_epoch, lambda: epoch_order(rows_of_epoch, seed=0, epoch=1), note, cost=True)


def _feed(folder: ShardFolder, rows: _Rows, a: Augmentation, repeat: int) -> Callable[[], None]:
    """Everything that the feeder thread does for DALI, to a graph that only looks at the headers."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=len(rows), num_threads=1, device_id=None, prefetch_queue_depth=1)  # type: ignore
    def headers() -> Any:
        jpegs = fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1, no_copy=True)  # type: ignore
        parameters = fn.external_source(name="parameters", dtype=types.FLOAT, ndim=2)  # type: ignore
        return fn.peek_image_shape(jpegs), parameters

    pipe: Any = headers()

    def run() -> None:
        for _ in range(repeat):
            request = _request(folder, rows, a)
            pipe.run(jpegs=list(request.jpegs), parameters=dali.pack(request.plan))

    return run


def busy_rows(shards: Path, rounds: int) -> list[Measurement]:
    """Samples a second that a feeder thread prepares while the main thread idles, and while it runs Python.

    Preparing is all but cropping: read, plan, pack, masks. Wall time, as the two threads share one lock.
    """
    figures: dict[str, list[float]] = {"idle": [], "busy in Python": []}
    a = preset("dino")
    for _, state in itertools.product(range(rounds), figures):
        with ShardFolder(shards) as folder:
            chosen = np.resize(np.arange(len(folder)), 64)

            def prepared(folder: ShardFolder = folder, chosen: _Rows = chosen) -> Iterator[int]:
                for epoch in itertools.count():
                    request = _request(folder, chosen, a)
                    dali.pack(request.plan)
                    block_masks(folder.index.uid[chosen], epoch=epoch, seed=0, augmentation=a)
                    yield len(chosen)

            feeder = Feeder(prepared, depth=2)
            figures[state].append(_consumed(feeder, busy=state != "idle"))
            feeder.close()
    return [
        Measurement(f"feeder thread, main thread {state}", "samples/s", tuple(f), "wall time; batches of 64")
        for state, f in figures.items()
    ]


def _consumed(feeder: Feeder[int], *, busy: bool) -> float:
    feeder.get()
    count, work, start = 0, 0, time.perf_counter()
    while time.perf_counter() - start < _BUSY_SECONDS:
        if busy:
            for _ in range(1000):
                work += 1
            if not feeder.ready:
                continue
        count += feeder.get()
    return count / (time.perf_counter() - start)


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
