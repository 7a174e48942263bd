"""Commit records: a tar shard is in the cache if and only if its record is. One writer a shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache_tools.layout import (
    FORMAT_VERSION,
    REPAIR,
    CacheCorrupt,
    CacheIncomplete,
    CacheSpec,
    Paths,
    cache_lock,
    read_json,
    write_small,
)
from common.errors import UserError
from common.files import canonical_json, file_sha256, json_sha256
from common.locks import file_lock

METADATA_COPY = "metadata_copy"  # laid out as the cache itself: what all its rows depend on, once more
METADATA_SUMS = "sums.json"


@dataclass(frozen=True)
class FileRecord:
    """What a commit record says of a file.

    Attributes:
        bytes: its size.
        sha256: over the stored crc32c of its chunks, in order. Not over the file: a CRC over data that carry their
            own CRC is a constant, and a sha256 of all bytes would cost another pass over them.
        head: crc32c of its first chunk, which tells a file of another shard at the first read.
    """

    bytes: int
    sha256: str
    head: int


@dataclass(frozen=True)
class Commit:
    """The record of one tar shard in one view set.

    Attributes:
        shard: number of the tar shard.
        rows: its rows.
        fingerprint: sha256 of the fingerprint under which it was written.
        files: record of each array's file.
    """

    shard: int
    rows: int
    fingerprint: str
    files: dict[str, FileRecord]


def write_commit(paths: Paths, view_set: int, commit: Commit) -> None:
    """Write the record that makes a shard exist. Its files must be durable and in place."""
    write_small(paths.commit(view_set, commit.shard), canonical_json(asdict(commit)) + b"\n")


def read_commit(paths: Paths, view_set: int, shard: int, spec: CacheSpec, fingerprint: str) -> Commit:
    """Read and check one record; CacheCorrupt where it does not fit the cache it lies in."""
    path = paths.commit(view_set, shard)
    value = read_json(path)
    try:
        files = {name: FileRecord(**record) for name, record in value.pop("files").items()}
        commit = Commit(files=files, **value)
    except (KeyError, TypeError, AttributeError) as error:
        raise CacheCorrupt(f"{path}: not a commit record of this version ({error!r}). {REPAIR}") from error
    for name, found, expected in (
        ("shard", commit.shard, shard),
        ("rows", commit.rows, spec.shard_rows[shard]),
        ("fingerprint", commit.fingerprint, fingerprint),
        ("files", sorted(commit.files), sorted(array.name for array in spec.arrays())),
    ):
        if found != expected:
            raise CacheCorrupt(f"{path}: {name} is {found}, this cache needs {expected}. {REPAIR}")
    return commit


def committed_shards(paths: Paths, view_set: int, spec: CacheSpec) -> list[int]:
    """Return the shards that have a record, ascending."""
    found = (path.stem for path in paths.commits(view_set).glob("[0-9]*.json"))
    return sorted(int(stem) for stem in found if stem.isdigit() and int(stem) < spec.num_shards)


def read_commits(paths: Paths, view_set: int, spec: CacheSpec, fingerprint: str) -> dict[int, Commit]:
    """Return the records of a finished view set by shard; CacheIncomplete where some are not there."""
    done = committed_shards(paths, view_set, spec)
    missing = sorted(set(range(spec.num_shards)) - set(done))
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise CacheIncomplete(
            f"{paths.root}: view set {view_set} lacks {len(missing)} of {spec.num_shards} shards ({shown}). "
            "The build was stopped; the same build command again continues it."
        )
    return {shard: read_commit(paths, view_set, shard, spec, fingerprint) for shard in done}


def finished_view_sets(paths: Paths, spec: CacheSpec) -> list[int]:
    """Return the numbers of the view sets of which every shard is committed."""
    return [k for k in paths.view_sets() if len(committed_shards(paths, k, spec)) == spec.num_shards]


@contextmanager
def shard_lock(paths: Paths, view_set: int, shard: int) -> Iterator[bool]:
    """Hold the only right to write a shard; yields False where another process holds it.

    The kernel drops the lock with the process. The lock file is removed once the shard is committed;
    whoever takes a lock must therefore look for the record again.
    """
    path = paths.commits(view_set) / f".lock.{shard:06d}"
    with file_lock(path, timeout=0) as held:
        yield held
        if held and paths.commit(view_set, shard).exists():
            path.unlink(missing_ok=True)


def remove_spent_locks(paths: Paths) -> None:
    """Remove the lock files of committed shards, which a killed process leaves.

    Whoever still takes such a lock looks for the record again and finds it.
    """
    for path in paths.root.glob("commit/v*/.lock.*"):
        if path.with_name(f"{path.suffix.removeprefix('.')}.json").exists():
            path.unlink(missing_ok=True)


def write_manifest(paths: Paths, spec: CacheSpec, fingerprint: dict[str, Any]) -> list[int]:
    """List the finished view sets in manifest.json and return them; derived, so any rank may."""
    with cache_lock(paths.root):
        finished = finished_view_sets(paths, spec)
        value = {
            "format_version": FORMAT_VERSION,
            "fingerprint": json_sha256(fingerprint),
            "shards": spec.num_shards,
            "rows": spec.num_rows,
            "bytes_per_view_set": spec.view_set_bytes(),
            "view_sets": finished,
        }
        write_small(paths.manifest, canonical_json(value) + b"\n")
    return finished


def keep_metadata_copy(root: Path) -> None:
    """Copy a cache's sound metadata, a few kB; does nothing where a sound copy exists."""
    with cache_lock(root):
        copy = root / METADATA_COPY
        if copy_is_sound(copy):
            return
        files = _metadata(root)
        for file in files:
            target = copy / file.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_small(target, file.read_bytes())
        sums = {str(file.relative_to(root)): file_sha256(file) for file in files}
        write_small(copy / METADATA_SUMS, canonical_json(sums) + b"\n")


def _metadata(root: Path) -> list[Path]:
    data = Paths(root).data
    codec = data / "codec"
    return [data / "zarr.json", *sorted(path for path in codec.rglob("*") if path.is_file())]


def copy_is_sound(copy: Path) -> bool:
    """Tell whether the files of a copy are there and fit its checksums."""
    try:
        sums = read_json(copy / METADATA_SUMS)
        return bool(sums) and all(file_sha256(copy / name) == sha256 for name, sha256 in sums.items())
    except (UserError, OSError, TypeError):
        return False
