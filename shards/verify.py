"""Check a shard folder to the byte and name the shard and row of each fault."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy.typing as npt
import simplejpeg
from tqdm import tqdm

from common.errors import UserError
from common.files import file_sha256, size_text
from shards.manifest import (
    BLOCK,
    INDEX_NAME,
    MANIFEST_NAME,
    SOURCE_NAME,
    WORK_FOLDER,
    Manifest,
    ShardEntry,
    add_sample,
    load_manifest,
    name_uid,
    open_tar,
    padded,
    plain_key,
    read_index,
    sample_json,
    unique_key,
)
from shards.sources.base import is_system_folder
from shards.workers import check_stop, run_jobs

_LAST_DESCRIPTION = 1 << 16  # bytes that hold any description, where no next sample tells its end


@dataclass(frozen=True)
class Fault:
    """Something that is not as the manifest and the index say; `row` is None where it concerns no one row."""

    file: str
    row: int | None
    what: str

    def __str__(self) -> str:
        return f"{self.file}: " + ("" if self.row is None else f"row {self.row}: ") + self.what


@dataclass(frozen=True)
class _Shard:
    """One tar and what is known of its rows, small enough to be sent to another process."""

    path: Path
    entry: ShardEntry
    class_names: tuple[str, ...]
    decode_every: int  # decode the rows whose number it divides; 0 decodes none
    rows: range  # their numbers; empty where the index is damaged
    columns: Mapping[str, npt.NDArray[Any]]  # the index of these rows

    def of_row(self, row: int, *columns: str) -> list[int]:
        """Return entries of the index."""
        return [int(self.columns[name][row - self.rows.start]) for name in columns]

    def fault(self, what: str, row: int | None = None) -> Fault:
        """Return a fault of this shard."""
        return Fault(self.entry.name, row, what)


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
    columns: dict[str, npt.NDArray[Any]] = {}
    try:
        columns = vars(read_index(folder, manifest))
    except (UserError, OSError) as error:
        faults.append(Fault(INDEX_NAME, None, f"shards are checked by hash alone, since {error}"))
    total = sum(shard.bytes for shard in manifest.shards)
    processes = min(workers or len(os.sched_getaffinity(0)), len(manifest.shards))
    jobs = _shards(folder, manifest, columns, round(1 / decode) if decode else 0)
    of_shards: dict[str, list[Fault]] = {}
    with tqdm(total=total, desc="verifying", unit="B", unit_scale=True, disable=not progress) as bar:

        def report(checked: tuple[ShardEntry, list[Fault]]) -> None:
            of_shards[checked[0].name] = checked[1]
            bar.update(checked[0].bytes)

        run_jobs(_verify_shard, jobs, processes, report)
    return faults + [fault for shard in manifest.shards for fault in of_shards[shard.name]]


def _shards(
    folder: Path, manifest: Manifest, columns: Mapping[str, npt.NDArray[Any]], decode_every: int
) -> Iterator[_Shard]:
    first = 0
    for entry in manifest.shards:
        rows = range(first, first + entry.rows) if columns else range(0)
        of_rows = {name: column[rows.start : rows.stop] for name, column in columns.items()}
        yield _Shard(folder / entry.name, entry, manifest.class_names, decode_every, rows, of_rows)
        first += entry.rows


def _listed_files(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Compare the folder's listing with the manifest, and hash the small files."""
    listed = {entry.name for entry in (*manifest.files, *manifest.shards)}
    present = {path.name for path in folder.iterdir() if not is_system_folder(path.name)}
    for name in sorted(listed - present):
        yield Fault(name, None, "missing, though the manifest lists it")
    for name in sorted(present - listed - {MANIFEST_NAME, SOURCE_NAME}):
        left_over = "left over from packing; run the pack command again to remove it"
        yield Fault(name, None, left_over if name == WORK_FOLDER else "extra: not in the manifest")
    for entry in manifest.files:
        path = folder / entry.name
        if entry.name == INDEX_NAME or not path.is_file():  # the index is hashed where it is read
            continue
        try:
            if file_sha256(path) != entry.sha256:
                size = path.stat().st_size
                yield Fault(entry.name, None, f"sha256 differs ({size} bytes, the manifest says {entry.bytes})")
        except OSError as error:
            yield Fault(entry.name, None, f"cannot be read: {error.strerror}")


def _verify_shard(shard: _Shard) -> tuple[ShardEntry, list[Fault]]:
    """Check one tar by size and sha256; where they differ, look for the rows that are damaged."""
    path, entry = shard.path, shard.entry
    if not path.is_file():
        return entry, []
    size = path.stat().st_size
    try:
        faults = [] if entry.is_whole_in(path.parent) else _look_for_damage(shard, size)
        damaged = {fault.row for fault in faults}
        with path.open("rb") as tar:
            for row in shard.rows if shard.decode_every and size else ():
                if row % shard.decode_every == 0 and row not in damaged:
                    check_stop()
                    faults.extend(_decode(tar, shard, row))
    except OSError as error:
        faults = [shard.fault(f"cannot be read: {error.strerror}")]
    return entry, faults


def _look_for_damage(shard: _Shard, size: int) -> list[Fault]:
    """Compare each sample with what packing writes: by the index, and by the name in its own description."""
    listed = shard.entry.bytes
    faults = [] if size == listed else [shard.fault(f"{size} bytes, the manifest says {listed}")]
    with shard.path.open("rb") as tar:
        start = 0
        for row in shard.rows if size else ():
            if start >= size:
                missing = f"missing, with all later rows of the shard: the tar ends at byte {size}"
                return [*faults, shard.fault(missing, row)]
            # Where the description is damaged its length is not known: the next sample's place tells it.
            following = _sample_start(shard, row + 1) if row + 1 in shard.rows else None
            what, end = _compare(tar, start, following, shard, row)
            if what:
                faults.append(shard.fault(what, row))
            start = following or end
        if start:
            tar.seek(start)
            if tar.read() != bytes(listed - start):
                faults.append(shard.fault(f"the end of the archive is not {listed - start} zeros from byte {start}"))
    return faults or [shard.fault("its sha256 is not what the manifest says")]


def _sample_start(shard: _Shard, row: int) -> int:
    """Return where a sample begins: two headers and the label before its JPEG."""
    offset, label = shard.of_row(row, "offset", "label")
    return offset - 2 * BLOCK - padded(len(b"%d" % label))


def _compare(tar: BinaryIO, start: int, following: int | None, shard: _Shard, row: int) -> tuple[str, int]:
    """Return what is wrong with a sample, empty if nothing is, and where it ends."""
    label, size, offset, uid, crc32c = shard.of_row(row, "label", "size", "offset", "uid", "crc32c")
    tar.seek(start)
    sample = tar.read((following or offset + padded(size) + _LAST_DESCRIPTION) - start)
    jpeg = sample[offset - start : offset - start + size]
    description = sample[offset - start + padded(size) + BLOCK :]
    try:
        name = json.loads(description.partition(b"\0")[0])["name"]
        found_uid = name_uid(name)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its .json is cut, damaged or misplaced", following or offset + padded(size) + 2 * BLOCK
    if found_uid != uid:
        return f"its .json names {name!r}, whose id is not the index's", following or start
    unique = unique_key(name)
    key = unique if sample.startswith(unique.encode() + b".") else plain_key(name)[0]
    about = sample_json(name, shard.class_names[label] if label >= 0 else "", *shard.of_row(row, "height", "width"))
    expected = io.BytesIO()
    add_sample(open_tar(expected), key, cls=b"%d" % label, jpg=jpeg.ljust(size, b"\0"), json=about)
    wanted = expected.getvalue()
    end = start + len(wanted)
    if google_crc32c.value(jpeg) != crc32c:
        return f"its JPEG of {size} bytes at {offset} does not match its crc32c", end
    if sample[: len(wanted)] != wanted:
        pairs = zip(sample, wanted, strict=False)
        first = start + next((i for i, (a, b) in enumerate(pairs) if a != b), len(sample))
        return f"header, label, description or padding at byte {first} is not what packing writes", end
    return "", end


def _decode(tar: BinaryIO, shard: _Shard, row: int) -> Iterator[Fault]:
    offset, size, height, width = shard.of_row(row, "offset", "size", "height", "width")
    tar.seek(offset)
    try:
        found = simplejpeg.decode_jpeg(tar.read(size), strict=True).shape
    except ValueError as error:
        yield shard.fault(f"its JPEG does not decode: {error}", row)
        return
    if found != (height, width, 3):
        yield shard.fault(f"decodes to {found}, the index says {(height, width, 3)}", row)


def describe_faults(faults: list[Fault], folder: Path, manifest: Manifest) -> str:
    """Return the closing lines of a verification."""
    if not faults:
        total = sum(shard.bytes for shard in manifest.shards)
        return f"{folder}: {manifest.num_rows} rows in {len(manifest.shards)} shards, {size_text(total)}: whole."
    files = {fault.file for fault in faults}
    return (
        f"{folder}: {len(faults)} faults in {len(files)} files. Copy these files again from their source, or "
        "delete the folder and pack again."
    )
