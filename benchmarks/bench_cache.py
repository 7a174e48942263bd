"""The cache's reader and writer against np.memmap, zarr-python and plain file I/O, on rows of a ViT-L/16 in int8.

Every method reads the same rows of the same bytes into one preallocated buffer. Rounds are interleaved in random
order and a ratio is taken within a round, so a machine's moods fall on both sides of it; figures are medians.
Cold means that the kernel was asked to drop the files' pages just before.

    python -m benchmarks.bench_cache [--quick] [--folder DIR]
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import zarr

from benchmarks.results import append_rows, commit, hardware, versions
from cache_tools.codec import Calibration, EncodedRows, calibration_sha256
from cache_tools.commit import read_commits, write_manifest
from cache_tools.layout import FORMAT_VERSION, CacheSpec, Paths, create_group, create_view_set, read_attributes
from cache_tools.shard_file import ShardFileWriter, ViewSetFiles
from cache_tools.write import ShardWriter
from common.files import json_sha256
from pipeline.batch import CropBatch

RESULTS = Path(__file__).parent / "results" / "cache.csv"
BATCH = 64
Rows = npt.NDArray[np.int64]
Read = Callable[[Rows], None]


@dataclass(frozen=True)
class Comparison:
    """One way beside the others of its case.

    Attributes:
        case: what is done, and the state of the page cache.
        method: who does it.
        megabytes_per_second: median; MB are 10^6 bytes of rows.
        spread: interquartile range over the median.
        ratio: median over rounds of this method's speed over the reference's in the same round.
        images_per_second: median.
        cpu_seconds_per_gb: process CPU time, all threads.
        cpu_ratio: median over rounds of the reference's CPU time over this method's: the ratio that other programs on
            the machine disturb least, where the disk is not waited for.
        rounds: their number.
    """

    case: str
    method: str
    megabytes_per_second: float
    spread: float
    ratio: float
    images_per_second: float
    cpu_seconds_per_gb: float
    cpu_ratio: float
    rounds: int


def make_cache(root: Path, spec: CacheSpec) -> None:
    """Write a finished cache of random codes through the real writer."""
    calibration = Calibration(np.zeros(spec.embed_dim, np.float32), np.ones(spec.embed_dim, np.float32))
    fingerprint = {"codec": {"calibration": calibration_sha256(calibration)}}
    attributes = {
        "format_version": FORMAT_VERSION, "spec": spec.to_json(), "fingerprint": fingerprint, "soft": {}, "quality": {},
    }  # fmt: skip
    create_group(root, attributes, {"mean": calibration.mean, "std": calibration.std})
    create_view_set(root, 0, spec)
    paths = Paths(root)
    paths.commits(0).mkdir(parents=True)
    generator = np.random.default_rng(0)
    start = 0
    for shard, rows in enumerate(spec.shard_rows):
        writer = ShardWriter(paths, spec, 0, shard, json_sha256(fingerprint))
        numbers = np.arange(start, start + rows)
        group = CropBatch(
            rows=numbers, uids=numbers.astype(np.uint64), image_crcs=np.zeros(rows, np.uint32), view_set=0,
            labels=torch.empty(0), crops=torch.empty(0, dtype=torch.uint8),
            global_crops_spec=np.zeros((rows, 2, 6), np.int32),
        )  # fmt: skip
        shape = (rows, spec.num_crops, spec.num_patches, spec.embed_dim)
        codes = torch.from_numpy(generator.integers(-127, 128, shape, np.int8))
        scale = torch.ones(shape[:3], dtype=torch.float16)
        writer.append(group, EncodedRows(codes, scale, torch.ones((rows, *shape[1:2], shape[3])).half()))
        writer.start_commit()
        writer.finish()
        start += rows
    write_manifest(paths, spec, fingerprint)


class PatchReaders:
    """Every way to bring rows of the patch array into one buffer."""

    def __init__(self, root: Path, flat: Path, spec: CacheSpec):
        self.spec = spec
        self.array = spec.arrays()[0]
        self.out = np.empty((BATCH, self.array.row_bytes), np.uint8)
        self.slots = np.arange(BATCH)
        self.rows_per_shard = spec.capacity
        self.flat = flat
        self.map_again()
        fingerprint = read_attributes(root)["fingerprint"]
        commits = read_commits(Paths(root), 0, spec, json_sha256(fingerprint))
        self.files = ViewSetFiles(Paths(root), 0, spec, commits)
        self.zarr = zarr.open_array(root / "data.zarr/v0/patch", mode="r")

    def map_again(self) -> None:
        """Map the reference file anew: pages of a live mapping cannot be dropped."""
        self.memmap = np.memmap(self.flat, np.uint8, "r", shape=(self.spec.num_rows, self.array.row_bytes))

    def methods(self) -> dict[str, Read]:
        """Return the readers by name; the first is the reference."""
        return {
            "np.memmap": self.read_memmap,
            "direct, unchecked": lambda rows: self.read_direct(rows, check=False),
            "direct, crc32c": lambda rows: self.read_direct(rows, check=True),
            "zarr-python": self.read_zarr,
        }

    def read_memmap(self, rows: Rows) -> None:
        for slot, row in enumerate(rows):
            self.out[slot] = self.memmap[row]

    def read_direct(self, rows: Rows, *, check: bool) -> None:
        shards, places = np.divmod(rows, self.rows_per_shard)
        for shard in np.unique(shards):
            mine = np.flatnonzero(shards == shard)
            mine = mine[np.argsort(places[mine])]
            self.files.open(self.array, int(shard)).read(places[mine], self.out, self.slots[mine], check=check)

    def read_zarr(self, rows: Rows) -> None:
        out = self.out.view(np.int8).reshape(BATCH, *self.array.tail)
        for slot, row in enumerate(rows.tolist()):
            out[slot] = self.zarr[divmod(row, self.rows_per_shard)]


def drop_pages(folders: list[Path]) -> None:
    """Ask the kernel to forget the pages of every file below `folders`."""
    for folder in folders:
        for path in [folder, *folder.rglob("*")]:
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    case: str, methods: Mapping[str, Callable[[], int]], *, rounds: int, row_bytes: int, before: Callable[[], None]
) -> list[Comparison]:
    """Time each method once a round, in random order; a method returns the number of rows it moved."""
    for run in methods.values():  # warms up
        run()
    names = list(methods)
    speed: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    generator = np.random.default_rng(1)
    for _ in range(rounds):
        for i in generator.permutation(len(names)):
            before()
            began, began_cpu = time.perf_counter(), time.process_time()
            rows = methods[names[i]]()
            seconds = time.perf_counter() - began
            speed[names[i]].append(rows / seconds)
            cpu[names[i]].append((time.process_time() - began_cpu) / (rows * row_bytes / 1e9))
    results = []
    for name in names:
        low, middle, high = np.quantile(speed[name], [0.25, 0.5, 0.75])
        results.append(
            Comparison(
                case=case,
                method=name,
                megabytes_per_second=middle * row_bytes / 1e6,
                spread=(high - low) / middle,
                ratio=float(np.median(np.divide(speed[name], speed[names[0]]))),
                images_per_second=middle,
                cpu_seconds_per_gb=float(np.median(cpu[name])),
                cpu_ratio=float(np.median(np.divide(cpu[names[0]], cpu[name]))),
                rounds=rounds,
            )
        )
    return results


def read_batches(read: Read, order: str, num_rows: int, count: int, generator: np.random.Generator) -> int:
    """Read `count` batches, of rows at random or in a row from a random place; return the number of rows."""
    if order == "random":
        batches = [generator.choice(num_rows, BATCH, replace=False) for _ in range(count)]
    else:
        first = int(generator.integers(0, max(1, num_rows - count * BATCH + 1)))
        batches = list(np.arange(first, first + count * BATCH).reshape(count, BATCH) % num_rows)
    for rows in batches:
        read(rows)
    return count * BATCH


def bench_reading(root: Path, flat: Path, spec: CacheSpec, *, rounds: int, count: int) -> list[Comparison]:
    """Measure reading, warm and cold, sequential and random."""
    readers = PatchReaders(root, flat, spec)
    generator = np.random.default_rng(2)
    results = []
    for temperature in ("warm", "cold"):
        for order in ("sequential", "random"):
            methods = {
                name: functools.partial(read_batches, read, order, spec.num_rows, count, generator)
                for name, read in readers.methods().items()
            }

            def before(cold: bool = temperature == "cold") -> None:
                if cold:
                    readers.map_again()
                    drop_pages([root, flat])

            row_bytes = readers.array.row_bytes
            case = f"read {order}, {temperature}"
            results += measure(case, methods, rounds=rounds, row_bytes=row_bytes, before=before)
    return results


def bench_writing(folder: Path, spec: CacheSpec, *, rounds: int) -> list[Comparison]:
    """Measure writing one shard of patch codes."""
    array, rows = spec.arrays()[0], spec.capacity
    data = np.random.default_rng(4).integers(0, 256, (rows, array.row_bytes), np.uint8)
    create_group(folder / "zarr", {}, {})
    create_view_set(folder / "zarr", 0, replace(spec, shard_rows=(rows,)))
    target = zarr.open_array(folder / "zarr/data.zarr/v0/patch", mode="r+", config={"write_empty_chunks": True})

    def raw(*, sync: bool) -> int:
        with (folder / "raw").open("wb", buffering=0) as file:
            for row in data:
                file.write(row)
            if sync:
                os.fsync(file)
        return rows

    def direct() -> int:
        writer = ShardFileWriter(folder / "direct", array, capacity=rows)
        for start in range(0, rows, BATCH):
            writer.append(data[start : start + BATCH])
        writer.close()
        return rows

    def by_zarr() -> int:
        target[0] = data.view(np.int8).reshape(rows, *array.tail)
        return rows

    methods = {
        "plain write + fsync": lambda: raw(sync=True),
        "plain write": lambda: raw(sync=False),
        "direct writer + fsync": direct,
        "zarr-python, no fsync": by_zarr,
    }
    return measure("write a shard", methods, rounds=rounds, row_bytes=array.row_bytes, before=lambda: None)


def print_table(results: list[Comparison]) -> None:
    """Print the measurements."""
    columns = f"{'MB/s':>8}{'spread':>8}{'ratio':>8}{'images/s':>10}{'cpu-s/GB':>10}{'cpu ratio':>11}"
    print(f"{'case':26}{'method':26}{columns}")
    for r in results:
        print(
            f"{r.case:26}{r.method:26}{r.megabytes_per_second:8.0f}{r.spread:8.0%}{r.ratio:8.2f}"
            f"{r.images_per_second:10.0f}{r.cpu_seconds_per_gb:10.2f}{r.cpu_ratio:11.2f}"
        )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute: fewer rows and rounds, nothing is recorded")
    parser.add_argument("--folder", type=Path, help="where to put 2 GB of test data (the temporary folder)")
    options = parser.parse_args()
    shards, rows, rounds, count = (2, 128, 3, 2) if options.quick else (8, 256, 9, 8)
    spec = CacheSpec((rows,) * shards, num_crops=2, num_patches=196, embed_dim=1024, codec="int8")
    with tempfile.TemporaryDirectory(prefix="bench-cache-", dir=options.folder) as name:
        folder = Path(name)
        root, flat = folder / "cache", folder / "flat.bin"
        make_cache(root, spec)
        np.random.default_rng(0).integers(0, 256, (spec.num_rows, spec.arrays()[0].row_bytes), np.uint8).tofile(flat)
        os.sync()
        results = bench_reading(root, flat, spec, rounds=rounds, count=count)
        results += bench_writing(folder, spec, rounds=rounds)
    print_table(results)
    if not options.quick:
        about = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": hardware(), "versions": versions()}
        about |= {"batch": str(BATCH), "dtype": "int8", "row_bytes": str(spec.arrays()[0].row_bytes)}
        append_rows(RESULTS, [about | asdict(result) for result in results])


if __name__ == "__main__":
    main()
