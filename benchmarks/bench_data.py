"""The data path against its peers: images per core-second on a CPU, images per second and memory on a GPU.

Every row is measured in every round, the order rotated by one, so that a machine's moods fall on all alike; the
figure is the median over rounds. On the CPU the clock is the process's own CPU time, all threads: it does not
count the time that other programs take, which a wall clock would on a shared machine.
"""

from __future__ import annotations

import importlib
import io
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from benchmarks.data_gpu import gpu_rows
from benchmarks.peers import PillowRecipe, TorchvisionRecipe
from benchmarks.results import Measurement, Row, append_measurements, measure, parser_of, print_table
from benchmarks.synthetic import write_images
from pipeline import dali
from pipeline.augmentation import Augmentation, named_augmentation
from pipeline.backend import open_backend
from pipeline.cpu_crops import decode
from pipeline.crops import BackendOptions, CropRequest, training_work
from pipeline.feeder import Feeder
from pipeline.masks import block_masks
from pipeline.plan import crop_plan
from shards.folder import ShardFolder
from shards.pack import pack

BATCH = 32
# Most of ImageNet is 500 x 375 or 375 x 500.
SIZES = [(375, 500), (375, 500), (375, 500), (500, 375), (333, 500), (500, 334), (480, 640)]

_FULL = "full 2x224 + 8x96"
_RATIOS = [
    (f"{_FULL}: cpu", f"{_FULL}: torchvision v2, uint8"),
    (f"{_FULL}: cpu", f"{_FULL}: torchvision v2, as published"),
    (f"{_FULL}: cpu", f"{_FULL}: dali"),
    (f"{_FULL}: cpu", f"{_FULL}: Pillow"),
    (f"{_FULL}: dali", f"{_FULL}: torchvision v2, uint8"),
    (f"{_FULL}: torch", f"{_FULL}: torchvision v2, uint8"),
    ("read: copies by pread, random order", "read: webdataset iterator"),
]
_CPU = torch.device("cpu")
_READ_PASSES = 50
_PEER_NOTE = "one image at a time"
_DINOV3_NOTE = "DINOv3's transform as published, of torchvision's public transforms; one image at a time"
_DECODER_NOTE = "decoder of the cpu and torch backends; one image at a time"
_BUSY_SECONDS = 1.0
_Rows = npt.NDArray[np.int64]
_Item = TypeVar("_Item")


def cpu_rows(shards: Path, images: int, stack: ExitStack, *, quick: bool) -> list[Row]:
    """All rows that need no GPU; what they hold open is closed with the stack."""
    folder = stack.enter_context(ShardFolder(shards))
    a = named_augmentation("dino")
    rows = np.arange(min(images, len(folder)))
    jpegs = [j.tobytes() for j in folder.jpegs(rows)]
    return [
        *_read_rows(folder, rows),
        *_decode_rows(folder, rows, jpegs),
        *_crop_rows(a, folder, rows, stack),
        _each(f"{_FULL}: Pillow", PillowRecipe(a), jpegs, f"uint8; {_PEER_NOTE}"),
        *_torchvision_rows(a, jpegs),
        _plan_row(folder, rows, a, quick=quick),
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
    uint8, published = TorchvisionRecipe(a, normalise=False), TorchvisionRecipe(a, normalise=True)
    yield _each("decode: torchvision", decode_jpeg, tensors, _PEER_NOTE)
    yield _each(f"{_FULL}: torchvision v2, uint8", uint8, jpegs, f"uint8, not normalised; {_DINOV3_NOTE}")
    yield _each(f"{_FULL}: torchvision v2, as published", published, jpegs, f"float32; {_DINOV3_NOTE}")


def _each(name: str, work: Callable[[_Item], object], images: Sequence[_Item], note: str) -> Row:
    def run() -> None:
        for image in images:
            work(image)

    return Row(name, len(images), run, note)


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
    views = folder.jpegs(rows)
    sized = list(zip(views, folder.sizes(rows), strict=True))
    yield _each("decode: Pillow", _by_pillow, jpegs, _PEER_NOTE)
    yield _each("decode: simplejpeg, strict", lambda image: decode(*image), sized, _DECODER_NOTE)
    if dali.missing_reason() is None:
        pipe = dali.decode_pipeline(BackendOptions(_CPU, 1, BATCH))

        def by_dali() -> None:
            for start in range(0, len(views), BATCH):
                pipe.run(jpegs=views[start : start + BATCH])

        yield Row("decode: dali", len(rows), by_dali, f"batches of {BATCH}, 1 thread")


def _by_pillow(jpeg: bytes) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def _crop_rows(a: Augmentation, folder: ShardFolder, rows: _Rows, stack: ExitStack) -> Iterator[Row]:
    """Decode and crop with each backend, one thread, plan included."""
    for backend_name in ["cpu", "torch"] if dali.missing_reason() else ["dali", "cpu", "torch"]:
        backend = open_backend(backend_name, training_work(a, teacher_crops=False), BackendOptions(_CPU, 1, BATCH))
        stack.callback(backend.close)

        def run(backend: Any = backend) -> None:
            for start in range(0, len(rows), BATCH):
                backend.submit(_request(folder, rows[start : start + BATCH], a))
                backend.collect()

        yield Row(f"{_FULL}: {backend_name}", len(rows), run, f"uint8; batches of {BATCH}, 1 thread")


def _request(folder: ShardFolder, rows: _Rows, a: Augmentation) -> CropRequest:
    sizes = folder.sizes(rows)
    plan = crop_plan(folder.index.uid[rows], sizes, view_set=0, epoch=0, seed=0, augmentation=a)
    return CropRequest(folder.jpegs(rows), sizes, plan)


def _plan_row(folder: ShardFolder, rows: _Rows, a: Augmentation, *, quick: bool) -> Row:
    chosen = np.resize(rows, 64)
    uids, sizes, repeat = folder.index.uid[chosen], folder.sizes(chosen), 5 if quick else 50

    def plans() -> None:
        for epoch in range(repeat):
            crop_plan(uids, sizes, view_set=0, epoch=epoch, seed=0, augmentation=a)

    return Row("feeding: crop plan, 10 views", repeat * len(chosen), plans, f"batches of {len(chosen)}", cost=True)


def busy_rows(shards: Path, rounds: int) -> list[Measurement]:
    """Samples a second that a feeder thread prepares while the main thread idles, and while it runs Python.

    Preparing is all but cropping: read, plan, pack, masks. Wall time, as the two threads share one lock.
    """
    figures: dict[str, list[float]] = {"idle": [], "busy in Python": []}
    a = named_augmentation("dino")
    for _, state in itertools.product(range(rounds), figures):
        with ShardFolder(shards) as folder:
            chosen = np.resize(np.arange(len(folder)), 64)

            def prepared(folder: ShardFolder = folder, chosen: _Rows = chosen) -> Iterator[int]:
                for epoch in itertools.count():
                    request = _request(folder, chosen, a)
                    dali.arguments(request.plan, training_work(a, teacher_crops=False))
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


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, append the rows."""
    parser = parser_of("data", __doc__, images=128)
    parser.add_argument("--shards", type=Path, help="measure on these shards instead of made images")
    parser.add_argument("--only", choices=("cpu", "gpu"), help="leave the other's rows out")
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
