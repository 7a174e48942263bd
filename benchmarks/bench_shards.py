"""Packing and verifying against copying the bytes and decoding with Pillow, on JPEGs of ImageNet's size.

Every case runs in every round, the order rotated by one, and a ratio is taken within a round. The clock of a
case in one process is that process's CPU time, system time included: images per core-second. With several
processes it is the wall. Files are in the page cache: disks are not what is measured.

    python -m benchmarks.bench_shards [--quick]
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from benchmarks.results import Measurement, Row, append_measurements, measure, parser_of, print_table
from benchmarks.synthetic import write_images
from common.files import file_sha256
from shards.manifest import load_manifest
from shards.pack import pack
from shards.sanitize import sanitise
from shards.verify import verify

# As most of ImageNet; at quality 90 these images have its mean size, 110 KB.
SIZES = [(375, 500), (500, 375)]
_COPIES = 5  # of the data set, as links, for the command: or the start of Python is most of what is measured
_PACK, _COPY, _PILLOW = "pack, 1 process", "copy of the bytes", "decode with Pillow"
_RATIOS = [(_PACK, _COPY), (_PACK, _PILLOW), ("verify, decode none", "sha256 of the tars")]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, append the rows."""
    options = parser_of("shards", __doc__, images=800).parse_args(arguments)
    images, rounds = (64, 2) if options.quick else (options.images, options.rounds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images", SIZES, images)
        files = sorted((folder / "images").rglob("*.jpg"))
        kilobytes = sum(file.stat().st_size for file in files) / len(files) / 1000
        pack(folder / "images", folder / "shards", workers=1, progress=False)
        assert load_manifest(folder / "shards").counts["verbatim"] == images
        measured = measure(_rows(folder, files, f"{images} JPEGs of {kilobytes:.0f} KB"), rounds)
        measured += [*_ratios(measured), _several_processes(folder, images, rounds)]
    print_table(measured)
    append_measurements(options.results, measured)


def _rows(folder: Path, files: list[Path], note: str) -> list[Row]:
    shards = folder / "shards"
    tars = sorted(shards.glob("*.tar"))
    cases = {
        _PACK: lambda: pack(folder / "images", folder / "packed", workers=1, progress=False),
        "strict decode alone": lambda: [sanitise(file.read_bytes()) for file in files],
        _COPY: lambda: _copy(files, folder / "copied"),
        _PILLOW: lambda: [Image.open(io.BytesIO(file.read_bytes())).convert("RGB") for file in files],
        "verify, decode none": lambda: verify(shards, decode=0.0, workers=1, progress=False),
        "verify, decode all": lambda: verify(shards, decode=1.0, workers=1, progress=False),
        "sha256 of the tars": lambda: [file_sha256(tar) for tar in tars],
    }

    def clean_up() -> None:
        for output in ("packed", "copied"):
            shutil.rmtree(folder / output, ignore_errors=True)

    return [Row(name, len(files), run, note, clean_up=clean_up) for name, run in cases.items()]


def _copy(files: list[Path], target: Path) -> None:
    target.mkdir()
    for file in files:
        shutil.copyfile(file, target / file.name)


def _ratios(measured: list[Measurement]) -> list[Measurement]:
    found = {row.name: row for row in measured}
    rows = []
    for one, other in _RATIOS:
        pairs = zip(found[one].figures, found[other].figures, strict=True)
        rows.append(Measurement(f"ratio: {one} / {other}", "", tuple(a / b for a, b in pairs), found[one].note))
    return rows


def _several_processes(folder: Path, images: int, rounds: int) -> Measurement:
    """Pack by the command with a process a core; note the largest memory of all processes together."""
    speeds, peak = [], 0
    cores = len(os.sched_getaffinity(0))
    source, output = str(folder / "linked"), str(folder / "packed")
    for copy in range(_COPIES):
        shutil.copytree(folder / "images", folder / "linked" / f"copy{copy}", copy_function=os.link)
    command = [sys.executable, "-m", "shards", "pack", "--source", source, "--output", output]
    for _ in range(rounds):
        begin = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--rows-per-shard", "64"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            peak = max(peak, _memory_of_tree(process.pid))
            time.sleep(0.02)
        speeds.append(_COPIES * images / (time.perf_counter() - begin))
        shutil.rmtree(output)
    note = f"{_COPIES * images} images, start of Python included; {peak / 1e6:.0f} MB of memory in all at most"
    shutil.rmtree(source)
    return Measurement(f"pack command, {cores} processes", "images/s", tuple(speeds), note)


def _memory_of_tree(pid: int) -> int:
    """Return the proportional memory of a process and its children in bytes; 0 for what has ended."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = next((int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return own + sum(_memory_of_tree(int(child)) for child in children)


if __name__ == "__main__":
    main()
