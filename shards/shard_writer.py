"""Pack one shard: read, sanitise, write the tar, then the record that makes it count."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
import numpy.typing as npt

from common.atomic import open_atomic, write_atomic
from common.hashing import canonical_json, file_sha256
from shards.format import RowFlag, ShardEntry, name_uid, shard_name
from shards.index import COLUMN_DTYPES
from shards.listing import Listing
from shards.reader import ImageReader, SourceUnreadable
from shards.sanitize import MAX_FILE_BYTES, ImageRejected, ImageWarned, StoredImage, sanitise
from shards.sources.base import SourceItem
from shards.tar_format import SampleWriter

ROW_COLUMNS = {name: dtype for name, dtype in COLUMN_DTYPES.items() if name != "shard"}
WARNED_COUNT = "quarantined for a warning"  # of the quarantined: what other programs read all the same
Tick = Callable[[int, int], None]  # (rows done, rows quarantined); raises where packing is to stop


@dataclass(frozen=True)
class ShardSettings:
    """What decides a shard's bytes beside the listing.

    Attributes:
        class_names: classes in label order.
        rows_per_shard: source images planned a shard.
        keep_warned: see `sanitise`.
        skip_unreadable: quarantine what cannot be read instead of stopping.
    """

    class_names: tuple[str, ...]
    rows_per_shard: int
    keep_warned: bool
    skip_unreadable: bool


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a finished shard: its entry, its rows' columns, and what was left out.

    Attributes:
        entry: name, bytes, sha256 and rows of the tar; no tar exists where rows is 0.
        columns: index columns of its rows, `shard` aside.
        quarantined: name and reason of each image left out.
        counts: what happened to images, by kind.
    """

    entry: ShardEntry
    columns: dict[str, npt.NDArray[Any]]
    quarantined: list[dict[str, str]]
    counts: dict[str, int]


def sample_json(name: str, class_name: str, height: int, width: int) -> bytes:
    """Return the bytes of a sample's `.json`; `class_name` is empty where unknown."""
    return canonical_json({"name": name, "wnid": class_name, "width": width, "height": height})


def label_text(label: int) -> bytes:
    """Return the bytes of a sample's `.cls`."""
    return str(label).encode()


class _HashingFile:
    """Passes writes on and hashes them, so that a finished tar need not be read again."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.size += len(data)


class _Rows:
    """Collects the columns of a shard's rows."""

    def __init__(self) -> None:
        self._values: dict[str, list[int]] = {name: [] for name in ROW_COLUMNS}
        self.quarantined: list[dict[str, str]] = []
        self.counts: Counter[str] = Counter()

    def add(self, item: SourceItem, stored: StoredImage, offset: int, flags: RowFlag) -> None:
        row = {
            "offset": offset,
            "size": len(stored.jpeg),
            "height": stored.height,
            "width": stored.width,
            "label": item.label,
            "uid": name_uid(item.name),
            "crc32c": google_crc32c.value(stored.jpeg),
            "flags": int(flags),
        }
        for name, value in row.items():
            self._values[name].append(value)
        self.counts[f"re-encoded: {stored.origin}" if stored.origin else "verbatim"] += 1
        if RowFlag.RENAMED in flags:
            self.counts["renamed"] += 1
        if RowFlag.EOI_ADDED in flags:
            self.counts["end mark added"] += 1
        if RowFlag.MENDED in flags:
            self.counts["harmless faults mended"] += 1

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        return {name: np.array(self._values[name], dtype) for name, dtype in ROW_COLUMNS.items()}


def write_shard(
    number: int,
    output: Path,
    records: Path,
    listing: Listing,
    reader: ImageReader,
    settings: ShardSettings,
    tick: Tick,
) -> None:
    """Write the tar of that number to `output` and then its record to `records`.

    Raises:
        UserError: the disk is full, or the source cannot be read or changed.
    """
    start = number * settings.rows_per_shard
    positions = listing.order[start : start + settings.rows_per_shard].tolist()
    rows = _Rows()
    path = output / shard_name(number)
    with open_atomic(path) as file:
        sink = _HashingFile(file)
        writer = SampleWriter(sink)
        for position in positions:
            done = _write_row(position, listing, reader, settings, writer, rows)
            tick(1, 0 if done else 1)
        writer.close()
        reader.check_unchanged()
    columns = rows.columns()
    num_rows = len(columns["offset"])
    if num_rows == 0:
        path.unlink()
    entry = ShardEntry(path.name, sink.size, sink.sha256.hexdigest(), num_rows)
    write_record(records, number, ShardRecord(entry, columns, rows.quarantined, dict(rows.counts)))


def _write_row(
    position: int,
    listing: Listing,
    reader: ImageReader,
    settings: ShardSettings,
    writer: SampleWriter,
    rows: _Rows,
) -> bool:
    """Write the sample at a position of the listing, or quarantine it and return False."""
    item = listing.item(position)
    try:
        if item.size > MAX_FILE_BYTES:
            raise ImageRejected(f"too large: {item.size} bytes, the limit is {MAX_FILE_BYTES}")
        stored = sanitise(reader.read(item), keep_warned=settings.keep_warned)
    except ImageRejected as rejection:
        rows.quarantined.append({"name": item.name, "reason": str(rejection)})
        if isinstance(rejection, ImageWarned):
            rows.counts[WARNED_COUNT] += 1
        return False
    except SourceUnreadable as unreadable:
        if not settings.skip_unreadable:
            raise
        rows.quarantined.append({"name": item.name, "reason": f"unreadable: {unreadable.__cause__}"})
        return False
    key, renamed = listing.key(position, item.name)
    class_name = settings.class_names[item.label] if item.label >= 0 else ""
    offset = writer.write(
        key,
        cls=label_text(item.label),
        jpg=stored.jpeg,
        json=sample_json(item.name, class_name, stored.height, stored.width),
    )
    rows.add(item, stored, offset, stored.flags | (RowFlag.RENAMED if renamed else RowFlag(0)))
    return True


def write_record(records: Path, number: int, record: ShardRecord) -> None:
    """Write the record of a finished shard, at once."""
    about = {"entry": asdict(record.entry), "quarantined": record.quarantined, "counts": record.counts}
    arrays: dict[str, Any] = {"about": np.frombuffer(canonical_json(about), np.uint8), **record.columns}
    write_atomic(records / f"{number:06d}.npz", lambda file: np.savez(file, **arrays))


def read_record(records: Path, number: int) -> ShardRecord | None:
    """Read the record of a shard; None where it is not finished."""
    path = records / f"{number:06d}.npz"
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as archive:
        about = json.loads(archive["about"].tobytes())
        columns = {name: archive[name] for name in ROW_COLUMNS}
    return ShardRecord(ShardEntry(**about["entry"]), columns, about["quarantined"], about["counts"])


def is_finished(number: int, output: Path, records: Path) -> ShardRecord | None:
    """Return the record of a shard whose tar is there and hashes to it; None where it is to be packed."""
    record = read_record(records, number)
    if record is None or record.entry.rows == 0:
        return record
    path = output / record.entry.name
    if not path.exists() or path.stat().st_size != record.entry.bytes:
        return None
    return record if file_sha256(path) == record.entry.sha256 else None


def merged_columns(records: Sequence[ShardRecord], name: str) -> npt.NDArray[Any]:
    """Return one index column over all shards that hold rows."""
    filled = [record for record in records if record.entry.rows]
    if name == "shard":
        return np.repeat(np.arange(len(filled), dtype=np.int32), [record.entry.rows for record in filled])
    return np.concatenate([record.columns[name] for record in filled])
