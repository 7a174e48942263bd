"""Check a shard folder to the byte and name the shard and row of each fault."""

from __future__ import annotations

import hashlib
import json
import mmap
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

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
    load_manifest,
    name_uid,
    plain_key,
    unique_key,
)
from shards.index import ShardIndex, read_index
from shards.shard_writer import label_text, sample_json
from shards.tar_format import BLOCK, end_of_archive, member_header, padded

_SUFFIXES = (".cls", ".jpg", ".json")


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
    jobs = [(folder, manifest, k, _rows_of(index, manifest, k), every) for k in range(len(manifest.shards))]
    with tqdm(total=total, desc="verifying", unit="B", unit_scale=True, disable=not progress) as bar:
        for number, found in _map(jobs, processes):
            faults.extend(found)
            bar.update(manifest.shards[number].bytes)
            bar.set_postfix(faults=len(faults), refresh=False)
    return faults


_Job = tuple[Path, Manifest, int, _Rows | None, int]


def _map(jobs: list[_Job], processes: int) -> Iterator[tuple[int, list[Fault]]]:
    if processes == 1:
        yield from ((number, _verify_shard(*job)) for number, job in enumerate(jobs))
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from enumerate(pool.map(_verify_shard, *zip(*jobs, strict=True)))


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


def _verify_shard(
    folder: Path, manifest: Manifest, number: int, rows: _Rows | None, every: int
) -> list[Fault]:
    """Check one tar: size, sha256, and every byte of every sample against the index."""
    entry = manifest.shards[number]
    path = folder / entry.name
    if not path.is_file():
        return []
    size = path.stat().st_size
    faults = []
    if size != entry.bytes:
        faults.append(Fault(entry.name, None, f"{size} bytes, the manifest says {entry.bytes}"))
    if size == 0:
        return faults
    try:
        file = path.open("rb")
    except OSError as error:
        return [*faults, Fault(entry.name, None, f"cannot be read: {error.strerror}")]
    with file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
        tar.madvise(mmap.MADV_SEQUENTIAL)
        digest = hashlib.sha256()
        for sample in _samples(tar, manifest, rows):
            digest.update(memoryview(tar)[sample.start : sample.end])
            faults.extend(Fault(entry.name, sample.row, what) for what in sample.faults)
            if every and sample.row is not None and sample.row % every == 0 and not sample.faults:
                faults.extend(_decode(tar, rows, sample.row, entry.name))
        if size == entry.bytes and digest.hexdigest() != entry.sha256 and not faults:
            found, said = digest.hexdigest()[:16], entry.sha256[:16]
            faults.append(Fault(entry.name, None, f"sha256 {found}, the manifest says {said}"))
    return faults


@dataclass(frozen=True)
class _Sample:
    """A stretch of a tar and what is wrong with it; the end of the archive has no row."""

    row: int | None
    start: int
    end: int
    faults: list[str]


def _samples(tar: mmap.mmap, manifest: Manifest, rows: _Rows | None) -> Iterator[_Sample]:
    """Divide a tar into its samples, by the index, and compare each with what packing writes."""
    if rows is None:
        yield _Sample(None, 0, len(tar), [])
        return
    end = 0
    for position in range(len(rows.index)):
        label = int(rows.index.label[position])
        start = end
        if start >= len(tar):
            missing = f"missing, with all later rows of the shard: the tar ends at byte {len(tar)}"
            yield _Sample(rows.first + position, len(tar), len(tar), [missing])
            return
        jpeg = int(rows.index.offset[position])
        expected = start + BLOCK + padded(len(label_text(label))) + BLOCK
        faults = [] if jpeg == expected else [f"its JPEG is at {jpeg} by the index, at {expected} by the tar"]
        name, json_end, damage = _description(tar, rows.index, position)
        if damage:
            faults.append(damage)
        else:
            faults += _compare(tar, start, json_end, manifest, rows.index, position, name)
        # Where the description is damaged its length is not known: the next sample's place tells it.
        last = position + 1 == len(rows.index)
        end = json_end if last else _sample_start(rows.index, position + 1)
        yield _Sample(rows.first + position, start, min(end, len(tar)), faults)
    tail = end_of_archive(end)
    stretch = tar[end:]
    fault = [] if stretch == tail else [f"the end of the archive is not {len(tail)} zeros from byte {end}"]
    yield _Sample(None, min(end, len(tar)), len(tar), fault)


def _sample_start(index: ShardIndex, position: int) -> int:
    label = int(index.label[position])
    return int(index.offset[position]) - BLOCK - padded(len(label_text(label))) - BLOCK


def _description(tar: mmap.mmap, index: ShardIndex, position: int) -> tuple[str, int, str]:
    """Return the name in a sample's `.json`, where the sample ends, and what is wrong, if anything."""
    header = int(index.offset[position]) + padded(int(index.size[position]))
    data = header + BLOCK
    try:
        length = int(tar[header + 124 : header + 135], 8)
        name = json.loads(tar[data : data + length])["name"]
        uid = name_uid(name)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", padded(data + 1), "its .json is cut, damaged or misplaced"
    end = data + padded(length)
    if uid != int(index.uid[position]):
        return name, end, f"its .json names {name!r}, whose id is not the index's"
    return name, end, ""


def _compare(
    tar: mmap.mmap, start: int, end: int, manifest: Manifest, index: ShardIndex, position: int, name: str
) -> Iterator[str]:
    """Compare a sample's headers, label, description, padding and checksum with what packing writes."""
    label = int(index.label[position])
    jpeg, size = int(index.offset[position]), int(index.size[position])
    class_name = manifest.class_names[label] if label >= 0 else ""
    height, width = int(index.height[position]), int(index.width[position])
    contents = (label_text(label), None, sample_json(name, class_name, height, width))
    places = (start, jpeg - BLOCK, jpeg + padded(size))
    key = _key(tar[places[0] : places[0] + 100], name)
    for suffix, content, place in zip(_SUFFIXES, contents, places, strict=True):
        length = size if content is None else len(content)
        if tar[place : place + BLOCK] != member_header(key + suffix, length):
            yield f"the header of its {suffix} at byte {place} is not that of {key + suffix}, {length} bytes"
        data = place + BLOCK
        if content is not None and tar[data : data + length] != content:
            yield f"its {suffix} is {tar[data : data + length]!r}, the index says {content!r}"
        padding = tar[data + length : data + padded(length)]
        if padding != bytes(padded(length) - length):
            yield f"the padding after its {suffix} is cut or not zero"
    if google_crc32c.value(tar[jpeg : jpeg + size]) != int(index.crc32c[position]):
        yield f"its JPEG of {size} bytes at {jpeg} does not match its crc32c"
    if end > len(tar):
        yield f"it ends at byte {end}, the tar at {len(tar)}"


def _key(header_name: bytes, name: str) -> str:
    """Return the key that packing gave a name: the one of two that the tar shows."""
    unique = unique_key(name)
    return unique if header_name.startswith(unique.encode() + b".") else plain_key(name)[0]


def _decode(tar: mmap.mmap, rows: _Rows | None, row: int, file: str) -> Iterator[Fault]:
    assert rows is not None
    position = row - rows.first
    jpeg, size = int(rows.index.offset[position]), int(rows.index.size[position])
    expected = (int(rows.index.height[position]), int(rows.index.width[position]), 3)
    try:
        found = simplejpeg.decode_jpeg(tar[jpeg : jpeg + size], strict=True).shape
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
