"""The second copy of what every row of a cache depends on, the group's attributes and the codec's statistics."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from cache_tools.codec import load_calibration
from cache_tools.layout import CacheSpec, Paths, cache_lock, read_attributes, read_json, write_small
from common.errors import UserError
from common.files import canonical_json, file_sha256, json_sha256

_FOLDER = "metadata_copy"  # laid out as the cache itself
_SUMS = "sums.json"


def keep_metadata_copy(root: Path) -> None:
    """Copy a cache's sound metadata, a few kB; does nothing where a sound copy exists."""
    with cache_lock(root):
        copy = root / _FOLDER
        if _sums_hold(copy):
            return
        files = _metadata(root)
        for file in files:
            target = copy / file.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_small(target, file.read_bytes())
        sums = {str(file.relative_to(root)): file_sha256(file) for file in files}
        write_small(copy / _SUMS, canonical_json(sums) + b"\n")


def damaged_metadata(root: Path) -> dict[Path, Path]:
    """Return the files of a cache that its copy can replace, each with its copy; none where all are alike.

    The copy is taken where its checksums hold and its fingerprint is that of the commit records.
    """
    copy = root / _FOLDER
    if not _sums_hold(copy):
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
    pairs = {root / name: copy / name for name in read_json(copy / _SUMS)}
    return {file: twin for file, twin in pairs.items() if not file.is_file() or file.read_bytes() != twin.read_bytes()}


def _metadata(root: Path) -> list[Path]:
    data = Paths(root).data
    codec = data / "codec"
    return [data / "zarr.json", *sorted(path for path in codec.rglob("*") if path.is_file())]


def _sums_hold(copy: Path) -> bool:
    try:
        sums = read_json(copy / _SUMS)
        return bool(sums) and all(file_sha256(copy / name) == sha256 for name, sha256 in sums.items())
    except (UserError, OSError, TypeError):
        return False
