"""Pack one shard: read, sanitise, write the tar, then the record that makes it count."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from common.atomic import open_atomic, write_atomic
from common.hashing import canonical_json, file_sha256
from shards.format import RowFlag, ShardEntry, name_uid, shard_name
from shards.images import ImageReader, SourceUnreadable
from shards.index import COLUMN_DTYPES
from shards.sanitize import MAX_FILE_BYTES, ImageRejected, ImageWarned, StoredImage, sanitise
from shards.sources.base import Container, SourceItem
from shards.tar_format import add_sample, open_tar
from shards.workers import check_stop

ROW_COLUMNS = {name: dtype for name, dtype in COLUMN_DTYPES.items() if name != "shard"}
WARNED_COUNT = "quarantined for a warning"  # of the quarantined: what other programs read all the same


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

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        return {name: np.array(self._values[name], dtype) for name, dtype in ROW_COLUMNS.items()}


@dataclass(frozen=True)
class ShardJob:
    """All that packing one shard needs, small enough to be sent to another process.

    Attributes:
        number: of the shard in the plan.
        output: folder of the tars.
        records: folder of the records of finished shards.
        containers: where the images lie.
        settings: see `ShardSettings`.
        rows: item, tar key and whether that is not its plain name, of each row.
    """

    number: int
    output: Path
    records: Path
    containers: Sequence[Container]
    settings: ShardSettings
    rows: Sequence[tuple[SourceItem, str, bool]]


def finish_shard(job: ShardJob) -> tuple[int, int]:
    """Keep the shard if it is finished and whole, otherwise pack it; return rows done and of these quarantined.

    Raises:
        UserError: the disk is full, or the source cannot be read or changed.
    """
    record = finished_record(job.number, job.output, job.records)
    if record is None:
        with ImageReader(job.containers) as reader:
            record = _write_shard(job, reader)
    return record.entry.rows + len(record.quarantined), len(record.quarantined)


def _write_shard(job: ShardJob, reader: ImageReader) -> ShardRecord:
    """Write the tar and then its record."""
    rows, path = _Rows(), job.output / shard_name(job.number)
    with open_atomic(path) as file:
        with open_tar(file) as tar:
            for item, key, renamed in job.rows:
                check_stop()
                stored = _stored_or_quarantined(item, reader, job.settings, rows)
                if stored is None:
                    continue
                class_name = job.settings.class_names[item.label] if item.label >= 0 else ""
                offset = add_sample(
                    tar,
                    key,
                    cls=label_text(item.label),
                    jpg=stored.jpeg,
                    json=sample_json(item.name, class_name, stored.height, stored.width),
                )
                rows.add(item, stored, offset, stored.flags | (RowFlag.RENAMED if renamed else RowFlag(0)))
        reader.check_unchanged()
    columns = rows.columns()
    entry = ShardEntry(path.name, path.stat().st_size, file_sha256(path), len(columns["offset"]))
    if entry.rows == 0:
        path.unlink()
    record = ShardRecord(entry, columns, rows.quarantined, dict(rows.counts))
    write_record(job.records, job.number, record)
    return record


def _stored_or_quarantined(
    item: SourceItem, reader: ImageReader, settings: ShardSettings, rows: _Rows
) -> StoredImage | None:
    try:
        if item.size > MAX_FILE_BYTES:
            raise ImageRejected(f"too large: {item.size} bytes, the limit is {MAX_FILE_BYTES}")
        return sanitise(reader.read(item), keep_warned=settings.keep_warned)
    except ImageRejected as rejection:
        reason = str(rejection)
        if isinstance(rejection, ImageWarned):
            rows.counts[WARNED_COUNT] += 1
    except SourceUnreadable as unreadable:
        if not settings.skip_unreadable:
            raise
        reason = f"unreadable: {unreadable.__cause__}"
    rows.quarantined.append({"name": item.name, "reason": reason})
    return None


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


def finished_record(number: int, output: Path, records: Path) -> ShardRecord | None:
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
