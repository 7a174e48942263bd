"""The listing of a source on disk: every image's name, place, label and id, and the order of rows.

It lies in files that are mapped, not in memory, so that a packer's memory does not grow with the data set.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from shards.format import name_digest, name_uid, plain_key, unique_key
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
_PACK = struct.Struct("<iiqqqq8s8s8sii").pack
assert struct.calcsize("<iiqqqq8s8s8sii") == _ROW.itemsize
_ROWS_FILE, _NAMES_FILE, _ORDER_FILE = "rows.bin", "names.bin", "order.npy"
_SEPARATOR = b"\0"  # between a name and the path of its file, where that is another


class Listing:
    """A finished listing, mapped."""

    def __init__(self, folder: Path) -> None:
        """Open the listing in `folder`."""
        self._rows = np.memmap(folder / _ROWS_FILE, _ROW, "r")
        self.order: npt.NDArray[np.int64] = np.load(folder / _ORDER_FILE, mmap_mode="r")
        with (folder / _NAMES_FILE).open("rb") as file:
            self._names = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._rows)

    @property
    def total_bytes(self) -> int:
        """Bytes of all images as they lie in the source."""
        return int(self._rows["size"].sum())

    def item(self, position: int) -> SourceItem:
        """Return the image at a position of the listing; a name met twice carries `#2`, `#3`, ..."""
        row = self._rows[position]
        start = int(self._rows[position - 1]["name_end"]) if position else 0
        raw_name, _, raw_path = self._names[start : int(row["name_end"])].partition(_SEPARATOR)
        name = raw_name.decode("utf-8", "surrogateescape")
        path = raw_path.decode("utf-8", "surrogateescape") or name
        container, label, offset, size, mtime = (
            int(row[column]) for column in ("container", "label", "offset", "size", "mtime_ns")
        )
        name = distinct_name(name, int(row["duplicate"]))
        return SourceItem(name, path, container, offset, size, mtime, label)

    def key(self, position: int, name: str) -> tuple[str, bool]:
        """Return the tar key of the image at a position and whether it is not its plain name."""
        row = self._rows[position]
        if row["suffix"]:
            return unique_key(name), True
        key, changed = plain_key(name)
        return key, changed or bool(row["duplicate"])

    def content_hash(self) -> str:
        """Return a sha256 over ids, labels and sizes in row order: equal for equal data, wherever it lies."""
        digest = hashlib.sha256()
        for block in np.array_split(self.order, max(1, len(self) // 65536)):
            rows = self._rows[block]
            for column in ("uid", "label", "size"):
                digest.update(np.ascontiguousarray(rows[column]).tobytes())
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
        if len(self) != len(other):
            return f"{len(other)} images then, {len(self)} now"
        return None


def distinct_name(name: str, duplicate: int) -> str:
    """Return the name itself, or `name#2` for its second occurrence in a source."""
    return f"{name}#{duplicate + 1}" if duplicate else name


def write_listing(folder: Path, items: Iterable[SourceItem], seed: int, where: str) -> Listing:
    """Stream a source's items into `folder`, number the names met twice and draw the order of rows.

    The order sorts rows by blake2b-8 of the name, keyed by the seed: a uniform shuffle that depends on the
    names and the seed alone, not on the platform, the numpy version or the order of listing.

    Raises:
        UserError: there is no image at all.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    order_seed = struct.pack("<q", seed)
    name_end = 0
    with (folder / _ROWS_FILE).open("wb") as rows, (folder / _NAMES_FILE).open("wb") as names:
        for item in items:
            name, path = os.fsencode(item.name), os.fsencode(item.path)
            names.write(name if path in (name, b"") else name + _SEPARATOR + path)
            name_end = names.tell()
            order_key = hashlib.blake2b(name, digest_size=8, key=order_seed).digest()
            key_hash = hashlib.blake2b(plain_key(item.name)[0].encode(), digest_size=8).digest()
            rows.write(
                _PACK(
                    item.container,
                    item.label,
                    item.offset,
                    item.size,
                    item.mtime_ns,
                    name_end,
                    name_digest(item.name),
                    order_key,
                    key_hash,
                    0,
                    0,
                )
            )
    if name_end == 0:
        raise UserError(f"{where}: 0 images found. Check the path and what lies there.")
    _number_duplicates(folder)
    rows_map = np.memmap(folder / _ROWS_FILE, _ROW, "r")
    order = np.lexsort((rows_map["uid"], rows_map["order_key"])).astype(np.int64)
    np.save(folder / _ORDER_FILE, order)
    return Listing(folder)


def _number_duplicates(folder: Path) -> None:
    """Give each repeated name a number and a new id, and mark the plain keys that several names share."""
    rows = np.memmap(folder / _ROWS_FILE, _ROW, "r+")
    listing_names = _Names(folder, rows)
    seen: dict[int, int] = {}
    for position in _repeated(rows["uid"]):
        uid = int(rows["uid"][position])
        seen[uid] = seen.get(uid, -1) + 1
        if seen[uid]:
            rows["duplicate"][position] = seen[uid]
            rows["uid"][position] = name_uid(distinct_name(listing_names[position], seen[uid]))
    rows["suffix"][list(_repeated(rows["key_hash"]))] = 1
    rows.flush()


class _Names:
    def __init__(self, folder: Path, rows: npt.NDArray[np.void]) -> None:
        self._bytes = np.memmap(folder / _NAMES_FILE, np.uint8, "r")
        self._rows = rows

    def __getitem__(self, position: int) -> str:
        start = int(self._rows["name_end"][position - 1]) if position else 0
        raw = self._bytes[start : int(self._rows["name_end"][position])].tobytes()
        return raw.partition(_SEPARATOR)[0].decode("utf-8", "surrogateescape")


def _repeated(values: npt.NDArray[np.uint64]) -> Iterator[int]:
    """Yield, in order, the positions of all values that occur more than once."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    equal = ordered[1:] == ordered[:-1]
    repeated = np.zeros(len(values), bool)
    repeated[order[1:][equal]] = True
    repeated[order[:-1][equal]] = True
    yield from np.flatnonzero(repeated).tolist()
