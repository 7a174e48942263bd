"""Repair of a cache: metadata is restored, damaged shards are taken out for a build to write again; nothing is lost."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from cache_tools.codec import load_calibration
from cache_tools.commit import (
    METADATA_COPY,
    METADATA_SUMS,
    committed_shards,
    copy_is_sound,
    keep_metadata_copy,
    shard_lock,
    write_manifest,
)
from cache_tools.layout import (
    CacheSpec,
    Paths,
    cache_lock,
    create_view_set,
    metadata_faults,
    partial_path,
    read_attributes,
    read_json,
    write_small,
)
from cache_tools.verify import Damage, verify_cache
from common.errors import UserError
from common.files import explain_disk_errors, json_sha256, sync_folder


def repair_cache(
    root: Path, *, agreed: Callable[[tuple[Damage, ...], str], bool] = lambda damages, plan: True
) -> tuple[Damage, ...]:
    """Restore metadata, and take every shard that a deep verification finds damaged out, for a build to write again.

    Nothing is deleted: what is taken out or replaced lies in `root/damaged/<time>` under the same path.

    Args:
        root: the cache.
        agreed: asked, before a file is moved, with the damage and one line on what would be moved.

    Returns:
        What was damaged, whether `agreed` or not.

    Raises:
        UserError: every record would go, which is a sign of damaged metadata or of another build's records.
    """
    aside = root / "damaged" / f"{datetime.now():%Y%m%dT%H%M%S.%f}"
    if replaced := _damaged_metadata(root):
        names = ", ".join(str(file) for file in replaced)
        plan = f"Not as they were written: {names}. They are moved to {aside}, and their copies take their place."
        if not agreed((), plan):
            return ()
        with cache_lock(root):
            for file, copy in replaced.items():
                _replace(file, copy.read_bytes(), root, aside)
    attributes = read_attributes(root)
    spec, paths = CacheSpec.from_json(attributes["spec"]), Paths(root)
    report = verify_cache(root, deep=True)
    damages = report.damages
    moved = [(damage.view_set, damage.shard) for damage in damages if damage.shard is not None]
    if len(moved) == report.shards > 1:
        raise UserError(
            f"{root}: all {len(moved)} records would go, so nothing was touched. Shards seldom break all at once: "
            f"{paths.data / 'zarr.json'} is damaged and has no sound copy, or the records are of another build. Copy "
            "that file or the cache again from where it came, or build in an empty folder. "
            f"The first: {damages[0].message}"
        )
    if not damages:  # of a cache that was built before there were copies, or whose copy is damaged
        keep_metadata_copy(root)
    files = [file for k, shard in moved for file in _shard_files(paths, spec, k, shard)]
    files += _unrecorded(paths, spec)
    size = sum(file.stat().st_size for file in files)
    plan = f"{len(moved)} records and {len(files)} files of {size:,} bytes are to be moved to {aside}."
    if not (damages or files) or not agreed(damages, plan):
        return damages
    for k in paths.view_sets():
        _restore_metadata(paths, k, spec, aside)
    for k, shard in moved:
        with shard_lock(paths, k, shard) as ours:
            if not ours:
                raise UserError(
                    f"{root}: shard {shard} of view set {k} is being written by another process. Wait for it, then "
                    "repair again."
                )
            _move_aside(paths.commit(k, shard), root, aside)
    for leftover in _unrecorded(paths, spec):  # each while its shard is locked; those of the records just moved too
        _move_aside(leftover, root, aside)
    if damages:
        write_manifest(paths, spec, attributes["fingerprint"])
    return damages


def _damaged_metadata(root: Path) -> dict[Path, Path]:
    """Return the files of a cache that its copy can replace, each with its copy; none where all are alike.

    The copy is taken where its checksums hold and its fingerprint is that of the commit records.
    """
    copy = root / METADATA_COPY
    if not copy_is_sound(copy):
        return {}
    pairs = [(root / name, copy / name) for name in read_json(copy / METADATA_SUMS)]
    differ = {file: twin for file, twin in pairs if not file.is_file() or file.read_bytes() != twin.read_bytes()}
    if not differ:
        return {}
    recorded: Counter[str] = Counter()
    for path in sorted((root / "commit").glob("v*/[0-9]*.json")):
        try:
            recorded[str(read_json(path).get("fingerprint"))] += 1
        except UserError:
            continue  # a damaged record says nothing here
    attributes = read_attributes(copy)
    digest = json_sha256(attributes["fingerprint"])
    load_calibration(copy, CacheSpec.from_json(attributes["spec"]), attributes["fingerprint"])
    if recorded and recorded.most_common(1)[0][0] != digest:
        return {}
    return differ


def _restore_metadata(paths: Paths, view_set: int, spec: CacheSpec, aside: Path) -> None:
    """Write broken metadata again: it follows from the cache's attributes."""
    broken = metadata_faults(paths, view_set, spec)
    if not broken:
        return
    with tempfile.TemporaryDirectory() as folder:
        fresh = Paths(Path(folder))
        fresh.data.mkdir()
        create_view_set(fresh.root, view_set, spec)
        with cache_lock(paths.root):
            for path in broken:
                _replace(path, (fresh.data / path.relative_to(paths.data)).read_bytes(), paths.root, aside)


def _replace(path: Path, data: bytes, root: Path, aside: Path) -> None:
    """Write a small file in the place of one that is moved aside; the caller holds the cache's lock."""
    if path.exists():
        _move_aside(path, root, aside)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_small(path, data)


def _move_aside(path: Path, root: Path, aside: Path) -> None:
    target = aside / path.relative_to(root)
    with explain_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        sync_folder(target.parent)
        sync_folder(path.parent)


def _shard_files(paths: Paths, spec: CacheSpec, view_set: int, shard: int) -> list[Path]:
    """Chunk files of one tar shard that exist, whole or half written."""
    chunks = (paths.chunk(view_set, array, shard) for array in spec.arrays())
    return [path for chunk in chunks for path in (chunk, partial_path(chunk)) if path.exists()]


def _unrecorded(paths: Paths, spec: CacheSpec) -> Iterator[Path]:
    """Chunk files of shards without a record, and what stopped builds left half written."""
    for k in paths.view_sets():
        done = set(committed_shards(paths, k, spec))
        for shard in range(spec.num_shards):
            if shard in done:
                continue
            with shard_lock(paths, k, shard) as ours:
                if ours:
                    yield from _shard_files(paths, spec, k, shard)
