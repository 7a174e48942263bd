"""Pack one shard: read, sanitise, write the tar, then the record that makes it count."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from common.files import canonical_json, file_sha256, open_atomic, write_atomic
from shards.manifest import COLUMN_DTYPES, RowFlag, ShardEntry, add_sample, name_uid, open_tar, sample_json
from shards.sanitize import MAX_FILE_BYTES, ImageRejected, ImageWarned, StoredImage, sanitise
from shards.sources.base import Container, ImageReader, SourceItem, SourceUnreadable
from shards.workers import check_stop

ROW_COLUMNS = {name: dtype for name, dtype in COLUMN_DTYPES.items() if name != "shard"}
WARNED_COUNT = "quarantined for a warning"  # of the quarantined: what other programs read all the same


@dataclass(frozen=True)
class ShardSettings:
    """What decides a shard's bytes beside the listing."""

    class_names: tuple[str, ...]  # in label order
    rows_per_shard: int  # source images planned a shard
    keep_warned: bool  # see `sanitise`
    skip_unreadable: bool  # quarantine what cannot be read instead of stopping


@dataclass(frozen=True)
class ShardJob:
    """All that packing one shard needs, small enough to be sent to another process."""

    number: int  # of the shard in the plan
    output: Path  # folder of the tars
    records: Path  # folder of the records of finished shards
    containers: Sequence[Container]  # where the images lie
    settings: ShardSettings
    rows: Sequence[tuple[SourceItem, str, bool]]  # item, tar key and whether that is not its plain name


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a finished shard: its entry, its rows' columns, and what was left out."""

    entry: ShardEntry  # no tar exists where its rows are 0
    columns: Mapping[str, npt.NDArray[Any]]  # index columns of its rows, `shard` aside
    quarantined: list[dict[str, str]]  # name and reason of each image left out
    counts: Mapping[str, int]  # what happened to images, by kind


def finish_shard(job: ShardJob) -> tuple[int, int]:
    """Keep the shard if it is finished and whole, otherwise pack it; return rows done and of these quarantined.

    UserError where the disk is full, or the source changed or cannot be read.
    """
    record = read_record(job.records, job.number)
    if record is None or (record.entry.rows and not record.entry.is_whole_in(job.output)):
        record = _write_shard(job)
    return record.entry.rows + len(record.quarantined), len(record.quarantined)


def _write_shard(job: ShardJob) -> ShardRecord:
    """Write the tar and then its record."""
    path = job.output / f"shard-{job.number:06d}.tar"
    rows: list[tuple[int, ...]] = []
    quarantined: list[dict[str, str]] = []
    counts: Counter[str] = Counter()
    with ImageReader(job.containers) as reader, open_atomic(path) as file:
        with open_tar(file) as tar:
            for item, key, renamed in job.rows:
                check_stop()
                try:
                    stored = _read_and_sanitise(item, reader, job.settings)
                except ImageRejected as rejection:
                    quarantined.append({"name": item.name, "reason": str(rejection)})
                    counts[WARNED_COUNT] += isinstance(rejection, ImageWarned)
                    continue
                class_name = job.settings.class_names[item.label] if item.label >= 0 else ""
                about = sample_json(item.name, class_name, stored.height, stored.width)
                offset = add_sample(tar, key, cls=b"%d" % item.label, jpg=stored.jpeg, json=about)
                flags = stored.flags | (RowFlag.RENAMED if renamed else RowFlag(0))
                uid, crc32c = name_uid(item.name), google_crc32c.value(stored.jpeg)
                pixels = (stored.height, stored.width)
                rows.append((offset, len(stored.jpeg), *pixels, item.label, uid, crc32c, int(flags)))
                counts[f"re-encoded: {stored.origin}" if stored.origin else "verbatim"] += 1
                counts["renamed"] += renamed
        reader.check_unchanged()
    table = np.array(rows, list(ROW_COLUMNS.items()))
    entry = ShardEntry(path.name, path.stat().st_size, file_sha256(path), len(rows))
    if not rows:
        path.unlink()
    record = ShardRecord(entry, {name: table[name] for name in ROW_COLUMNS}, quarantined, +counts)  # + drops zeros
    write_record(job.records, job.number, record)
    return record


def _read_and_sanitise(item: SourceItem, reader: ImageReader, settings: ShardSettings) -> StoredImage:
    if item.size > MAX_FILE_BYTES:
        raise ImageRejected(f"too large: {item.size} bytes, the limit is {MAX_FILE_BYTES}")
    try:
        data = reader.read(item)
    except SourceUnreadable as unreadable:
        if not settings.skip_unreadable:
            raise
        cause = unreadable.__cause__  # its words, not its path: the list is of this data set, not of this machine
        raise ImageRejected(f"unreadable: {cause.strerror if isinstance(cause, OSError) else cause}") from unreadable
    return sanitise(data, keep_warned=settings.keep_warned)


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


def merged_columns(records: Sequence[ShardRecord], name: str) -> npt.NDArray[Any]:
    """Return one index column over all shards that hold rows."""
    filled = [record for record in records if record.entry.rows]
    if name == "shard":
        return np.repeat(np.arange(len(filled), dtype=np.int32), [record.entry.rows for record in filled])
    return np.concatenate([record.columns[name] for record in filled])
