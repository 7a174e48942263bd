"""Check a shard folder to the byte and name the shard and row of each fault."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np
import simplejpeg
from tqdm import tqdm

from common.errors import UserError
from common.hashing import file_sha256
from shards.format import (
    INDEX_NAME,
    MANIFEST_NAME,
    WORK_FOLDER,
    Manifest,
    ShardEntry,
    load_manifest,
    name_uid,
    plain_key,
    unique_key,
)
from shards.index import ShardIndex, read_index
from shards.shard_writer import label_text, sample_json
from shards.tar_format import BLOCK, add_sample, open_tar, padded
from shards.workers import check_stop, run_jobs

_LAST_DESCRIPTION = 1 << 16  # bytes that hold any description, where no next sample tells its end


@dataclass(frozen=True)
class Fault:
    """Something that is not as the manifest and the index say; `row` is None where it concerns no one row."""

    file: str
    row: int | None
    what: str

    def __str__(self) -> str:
        """Return the fault in one line."""
        return f"{self.file}: " + ("" if self.row is None else f"row {self.row}: ") + self.what


@dataclass(frozen=True)
class _Rows:
    """The part of the index that concerns one shard, and its first row's number."""

    first: int
    index: ShardIndex

    def numbers(self) -> range:
        """Return the numbers of its rows."""
        return range(self.first, self.first + len(self.index))

    def sample_start(self, row: int) -> int:
        """Return where a row's sample begins: two headers and the label before its JPEG."""
        place = row - self.first
        return int(self.index.offset[place]) - 2 * BLOCK - padded(len(label_text(int(self.index.label[place]))))


def verify(
    shards_dir: str | Path, *, decode: float = 0.01, workers: int | None = None, progress: bool = True
) -> list[Fault]:
    """Check files, hashes, every tar header, label, description and JPEG checksum, and decode images.

    Args:
        shards_dir: the folder.
        decode: share of rows to decode, spread evenly; 1.0 decodes all.
        workers: processes; by default one a core.
        progress: show a bar.

    Returns:
        All faults found, in the order of files and rows; empty where the folder is whole.

    Raises:
        UserError: there is no manifest, or it is damaged, so that nothing can be compared.
    """
    folder = Path(shards_dir)
    if not 0.0 <= decode <= 1.0:
        raise UserError(f"decode is {decode}. It is a share of the rows: 0 to 1.")
    manifest = load_manifest(folder)
    faults = list(_listed_files(folder, manifest))
    try:
        index = read_index(folder, manifest)
    except (UserError, OSError) as error:
        faults.append(Fault(INDEX_NAME, None, f"shards are checked by hash alone, since {error}"))
        index = None
    total = sum(shard.bytes for shard in manifest.shards)
    every = round(1 / decode) if decode else 0
    processes = min(workers or len(os.sched_getaffinity(0)), len(manifest.shards))
    jobs = ((folder, manifest, k, _rows_of(index, manifest, k), every) for k in range(len(manifest.shards)))
    of_shards: dict[int, list[Fault]] = {}
    with tqdm(total=total, desc="verifying", unit="B", unit_scale=True, disable=not progress) as bar:

        def report(checked: tuple[int, list[Fault]]) -> None:
            number, of_shards[number] = checked
            bar.update(manifest.shards[number].bytes)

        run_jobs(_verify_shard, jobs, processes, report)
    return faults + [fault for number in sorted(of_shards) for fault in of_shards[number]]


def _rows_of(index: ShardIndex | None, manifest: Manifest, shard: int) -> _Rows | None:
    if index is None:
        return None
    first = sum(entry.rows for entry in manifest.shards[:shard])
    part = slice(first, first + manifest.shards[shard].rows)
    return _Rows(first, ShardIndex(**{name: column[part] for name, column in vars(index).items()}))


def _listed_files(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Compare the folder's listing with the manifest, and hash the small files."""
    listed = {entry.name for entry in (*manifest.files, *manifest.shards)}
    present = {path.name for path in folder.iterdir()}
    for name in sorted(listed - present):
        yield Fault(name, None, "missing, though the manifest lists it")
    for name in sorted(present - listed - {MANIFEST_NAME}):
        if name == WORK_FOLDER:
            yield Fault(name, None, "left over from packing; run the pack command again to remove it")
        else:
            yield Fault(name, None, "extra: not in the manifest")
    for entry in manifest.files:
        if entry.name == INDEX_NAME:  # hashed where it is read
            continue
        path = folder / entry.name
        try:
            same = not path.is_file() or file_sha256(path) == entry.sha256
        except OSError as error:
            yield Fault(entry.name, None, f"cannot be read: {error.strerror}")
            continue
        if not same:
            size = path.stat().st_size
            yield Fault(entry.name, None, f"sha256 differs ({size} bytes, the manifest says {entry.bytes})")


def _verify_shard(job: tuple[Path, Manifest, int, _Rows | None, int]) -> tuple[int, list[Fault]]:
    """Check one tar by size and sha256; where they differ, look for the rows that are damaged."""
    folder, manifest, number, rows, every = job
    entry = manifest.shards[number]
    path = folder / entry.name
    if not path.is_file():
        return number, []
    size = path.stat().st_size
    try:
        same = size == entry.bytes and file_sha256(path) == entry.sha256
        faults = [] if same else _look_for_damage(path, entry, size, manifest, rows)
        damaged = {fault.row for fault in faults}
        with path.open("rb") as tar:
            if rows is not None and every and size:
                for row in rows.numbers():
                    if row % every == 0 and row not in damaged:
                        check_stop()
                        faults.extend(_decode(tar, rows, row, entry.name))
    except OSError as error:
        faults = [Fault(entry.name, None, f"cannot be read: {error.strerror}")]
    return number, faults


def _look_for_damage(
    path: Path, entry: ShardEntry, size: int, manifest: Manifest, rows: _Rows | None
) -> list[Fault]:
    """Compare each sample with what packing writes: by the index, and by the name in its own description."""
    faults = [] if size == entry.bytes else [f"{size} bytes, the manifest says {entry.bytes}"]
    found = [Fault(entry.name, None, what) for what in faults]
    if rows is None or size == 0:
        return found or [Fault(entry.name, None, "its sha256 is not what the manifest says")]
    with path.open("rb") as tar:
        start = 0
        for row in rows.numbers():
            if start >= size:
                missing = f"missing, with all later rows of the shard: the tar ends at byte {size}"
                return [*found, Fault(entry.name, row, missing)]
            # Where the description is damaged its length is not known: the next sample's place tells it.
            following = rows.sample_start(row + 1) if row + 1 in rows.numbers() else None
            what, end = _compare(tar, start, following, manifest, rows, row)
            if what:
                found.append(Fault(entry.name, row, what))
            start = following or end
        tar.seek(start)
        tail = tar.read()
    if tail != bytes(entry.bytes - start):
        what = f"the end of the archive is not {entry.bytes - start} zeros from byte {start}"
        found.append(Fault(entry.name, None, what))
    return found or [Fault(entry.name, None, "its sha256 is not what the manifest says")]


def _compare(
    tar: BinaryIO, start: int, following: int | None, manifest: Manifest, rows: _Rows, row: int
) -> tuple[str, int]:
    """Return what is wrong with a sample, empty if nothing is, and where it ends."""
    place = row - rows.first
    label, size, jpeg_start = (int(getattr(rows.index, name)[place]) for name in ("label", "size", "offset"))
    tar.seek(start)
    sample = tar.read((following or jpeg_start + padded(size) + _LAST_DESCRIPTION) - start)
    jpeg = sample[jpeg_start - start : jpeg_start - start + size]
    description = sample[jpeg_start - start + padded(size) + BLOCK :]
    try:
        name = json.loads(description.partition(b"\0")[0])["name"]
        uid = name_uid(name)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its .json is cut, damaged or misplaced", following or jpeg_start + padded(size) + 2 * BLOCK
    if uid != int(rows.index.uid[place]):
        return f"its .json names {name!r}, whose id is not the index's", following or start
    unique = unique_key(name)
    key = unique if sample.startswith(unique.encode() + b".") else plain_key(name)[0]
    class_name = manifest.class_names[label] if label >= 0 else ""
    height, width = int(rows.index.height[place]), int(rows.index.width[place])
    expected = io.BytesIO()
    json_text = sample_json(name, class_name, height, width)
    add_sample(open_tar(expected), key, cls=label_text(label), jpg=jpeg.ljust(size, b"\0"), json=json_text)
    wanted = expected.getvalue()
    if google_crc32c.value(jpeg) != int(rows.index.crc32c[place]):
        return f"its JPEG of {size} bytes at {jpeg_start} does not match its crc32c", start + len(wanted)
    if sample[: len(wanted)] != wanted:
        pairs = zip(sample, wanted, strict=False)
        first = start + next((i for i, (a, b) in enumerate(pairs) if a != b), len(sample))
        return f"header, label, description or padding at byte {first} is not what packing writes", start + len(wanted)
    return "", start + len(wanted)


def _decode(tar: BinaryIO, rows: _Rows, row: int, file: str) -> Iterator[Fault]:
    place = row - rows.first
    tar.seek(int(rows.index.offset[place]))
    expected = (int(rows.index.height[place]), int(rows.index.width[place]), 3)
    try:
        found = simplejpeg.decode_jpeg(tar.read(int(rows.index.size[place])), strict=True).shape
    except ValueError as error:
        yield Fault(file, row, f"its JPEG does not decode: {error}")
        return
    if found != expected:
        yield Fault(file, row, f"decodes to {found}, the index says {expected}")


def describe_faults(faults: list[Fault], folder: Path, manifest: Manifest) -> str:
    """Return the closing lines of a verification."""
    if not faults:
        total = sum(shard.bytes for shard in manifest.shards)
        return f"{folder}: {manifest.num_rows} rows in {len(manifest.shards)} shards, {total / 1e9:.2f} GB: whole."
    files = np.unique([fault.file for fault in faults])
    return (
        f"{folder}: {len(faults)} faults in {len(files)} files. Copy these files again from their source, or "
        "delete the folder and pack again."
    )
