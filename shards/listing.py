"""The listing of a source on disk: every image's name, place, label and id, and the order of rows.

It lies in files that are mapped, not in memory, so that a packer's memory does not grow with the data set.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from shards.manifest import name_digest, name_uid, plain_key, unique_key
from shards.sources.base import SourceItem

_ROW = np.dtype(
    [
        ("container", "<i4"),
        ("label", "<i4"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("mtime_ns", "<i8"),
        ("name_end", "<i8"),  # in the file of names; the name begins where the one before ends
        ("uid", "<u8"),
        ("order_key", "<u8"),
        ("key_hash", "<u8"),
        ("duplicate", "<i4"),  # 0; n where the same name was listed n times before
        ("suffix", "<i4"),  # 1 where another name has the same plain key
    ]
)
_PACKED_ROW = struct.Struct("<iiqqqq8s8s8sii")
assert _PACKED_ROW.size == _ROW.itemsize
_ROWS_FILE, _NAMES_FILE, _ORDER_FILE = "rows.bin", "names.bin", "order.npy"
_SEPARATOR = b"\0"  # between a name and the path of its file, where that is another


class Listing:
    """A finished listing, mapped."""

    def __init__(self, folder: Path) -> None:
        """Open the listing in `folder`."""
        self._rows = _mapped(folder / _ROWS_FILE, _ROW)
        self._names = _mapped(folder / _NAMES_FILE, np.uint8)
        self.order: npt.NDArray[np.int64] = _mapped(folder / _ORDER_FILE)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def total_bytes(self) -> int:
        """Bytes of all images as they lie in the source."""
        return int(self._rows["size"].sum())

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """Label of each image, in the order of listing."""
        labels: npt.NDArray[np.int32] = self._rows["label"]
        return labels

    def item(self, position: int) -> SourceItem:
        """Return the image at a position of the listing; a name met twice carries `#2`, `#3`, ..."""
        row = self._rows[position]
        name, path = _name_and_path(self._rows, self._names, position)
        numbers = (int(row[column]) for column in ("container", "offset", "size", "mtime_ns", "label"))
        return SourceItem(_distinct_name(name, int(row["duplicate"])), path, *numbers)

    def key(self, position: int, name: str) -> tuple[str, bool]:
        """Return the tar key of the image at a position and whether it is not its plain name."""
        row = self._rows[position]
        if row["suffix"]:
            return unique_key(name), True
        key, changed = plain_key(name)
        return key, changed or bool(row["duplicate"])

    def content_hash(self, *columns: str) -> str:
        """Return a sha256 over columns in row order; by default ids, labels, sizes: equal for equal data anywhere."""
        digest = hashlib.sha256()
        for block in np.array_split(self.order, max(1, len(self) // 65536)):
            rows = self._rows[block]
            for column in columns or ("uid", "label", "size"):
                digest.update(rows[column].tobytes())
        return digest.hexdigest()

    def first_difference(self, other: Listing) -> str | None:
        """Return in words what differs from an earlier listing of the source; None where nothing does."""
        same = min(len(self), len(other))
        differs = np.zeros(same, bool)
        for column in ("container", "label", "offset", "size", "mtime_ns", "uid"):
            differs |= self._rows[column][:same] != other._rows[column][:same]
        if differs.any():
            position = int(np.argmax(differs))
            now, before = self.item(position), other.item(position)
            if now.name != before.name:
                return f"{min(now.name, before.name)} was added or removed"
            return f"{now.name}: size {before.size} then, {now.size} now; mtime or place may differ too"
        return None if len(self) == len(other) else f"{len(other)} images then, {len(self)} now"


def describe_plan(listing: Listing, class_names: Sequence[str]) -> list[str]:
    """Return the lines that say what is about to be packed: images, classes and the size of the outermost."""
    if not class_names:
        return [f"Plan: {len(listing)} images without labels."]
    labels = listing.labels
    counts = np.bincount(labels[labels >= 0], minlength=len(class_names))
    of_classes = [f"{class_names[label]} ({counts[label]})" for label in sorted({0, len(counts) - 1})]
    unknown = len(listing) - int(counts.sum())
    empty = [class_names[label] for label in np.flatnonzero(counts == 0).tolist()]
    lines = [f"Plan: {len(listing)} images of {len(class_names)} classes, {' to '.join(of_classes)}."]
    if unknown:
        lines.append(f"Without a label: {unknown} images.")
    if empty:
        lines.append(f"Without an image: {len(empty)} classes, {', '.join(empty[:5])}{', ...' if empty[5:] else ''}.")
    return lines


def write_listing(folder: Path, items: Iterable[SourceItem], seed: int, where: str) -> Listing:
    """Stream a source's items into `folder`, number the names met twice and draw the order of rows.

    The order sorts rows by blake2b-8 of the name, keyed by the seed: a uniform shuffle that depends on the
    names and the seed alone, not on the platform, the numpy version or the order of listing.
    UserError where there is no image at all.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    order_seed = struct.pack("<q", seed)
    name_end = 0
    with (folder / _ROWS_FILE).open("wb") as rows_file, (folder / _NAMES_FILE).open("wb") as names_file:
        for item in items:
            name, path = os.fsencode(item.name), os.fsencode(item.path)
            name_end += names_file.write(name if path in (name, b"") else name + _SEPARATOR + path)
            order_key = hashlib.blake2b(name, digest_size=8, key=order_seed).digest()
            key_hash = hashlib.blake2b(plain_key(item.name)[0].encode(), digest_size=8).digest()
            hashes = (name_digest(item.name), order_key, key_hash)
            place = (item.container, item.label, item.offset, item.size, item.mtime_ns, name_end)
            rows_file.write(_PACKED_ROW.pack(*place, *hashes, 0, 0))
    if name_end == 0:
        raise UserError(f"{where}: 0 images found. Check the path and what lies there.")
    rows = _mapped(folder / _ROWS_FILE, _ROW, "r+")
    _number_duplicates(rows, _mapped(folder / _NAMES_FILE, np.uint8))
    if isinstance(rows, np.memmap):
        rows.flush()
    else:
        rows.tofile(folder / _ROWS_FILE)
    np.save(folder / _ORDER_FILE, np.lexsort((rows["uid"], rows["order_key"])).astype(np.int64))
    return Listing(folder)


def _mapped(path: Path, dtype: npt.DTypeLike | None = None, mode: Literal["r", "r+"] = "r") -> npt.NDArray[Any]:
    """Map a file of numbers, or read it where its file system maps none; an .npy without a dtype."""
    try:
        return np.load(path, mmap_mode=mode) if dtype is None else np.memmap(path, dtype, mode)
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return np.load(path) if dtype is None else np.fromfile(path, dtype)


def _number_duplicates(rows: npt.NDArray[Any], names: npt.NDArray[np.uint8]) -> None:
    """Give each repeated name a number and a new id, and mark the plain keys that several names share."""
    seen: dict[int, int] = {}
    for position in _repeated(rows["uid"]).tolist():
        uid = int(rows["uid"][position])
        seen[uid] = seen.get(uid, -1) + 1
        if seen[uid]:
            name, _ = _name_and_path(rows, names, position)
            rows["duplicate"][position] = seen[uid]
            rows["uid"][position] = name_uid(_distinct_name(name, seen[uid]))
    rows["suffix"][_repeated(rows["key_hash"])] = 1


def _repeated(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return, in order, the positions of all values that occur more than once."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.flatnonzero(counts[inverse] > 1)


def _name_and_path(rows: npt.NDArray[Any], names: npt.NDArray[np.uint8], position: int) -> tuple[str, str]:
    start = int(rows[position - 1]["name_end"]) if position else 0
    name, _, path = names[start : int(rows[position]["name_end"])].tobytes().partition(_SEPARATOR)
    return os.fsdecode(name), os.fsdecode(path or name)


def _distinct_name(name: str, duplicate: int) -> str:
    return f"{name}#{duplicate + 1}" if duplicate else name
