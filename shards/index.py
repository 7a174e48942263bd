"""The index of all rows: where each JPEG lies, its size in pixels, label, id and checksum."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from shards.format import INDEX_NAME, Manifest, check_files, load_manifest

COLUMN_DTYPES: dict[str, npt.DTypeLike] = {
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int64,
    "height": np.int32,
    "width": np.int32,
    "label": np.int32,
    "uid": np.uint64,
    "crc32c": np.uint32,
    "flags": np.uint32,
}


@dataclass(frozen=True)
class ShardIndex:
    """One entry a row, in row order; every column is [N].

    Attributes:
        shard: position in the manifest's `shards`, not the number in the file name.
        offset: byte offset of the JPEG in its tar; the tar header of the JPEG is the 512 bytes before it.
        size: bytes of the JPEG.
        height: pixels.
        width: pixels.
        label: class, -1 where unknown.
        uid: blake2b-8, little endian, of the original relative name.
        crc32c: of the JPEG's bytes.
        flags: `shards.format.RowFlag`.
    """

    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    height: npt.NDArray[np.int32]
    width: npt.NDArray[np.int32]
    label: npt.NDArray[np.int32]
    uid: npt.NDArray[np.uint64]
    crc32c: npt.NDArray[np.uint32]
    flags: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.shard)


def load_index(shards_dir: str | Path) -> ShardIndex:
    """Read the index, checked against the manifest; every listed file must be there with its size.

    Raises:
        UserError: a file is missing, cut, or changed; the message names it.
    """
    folder = Path(shards_dir)
    manifest = load_manifest(folder)
    check_files(folder, manifest)
    return read_index(folder, manifest)


def read_index(folder: Path, manifest: Manifest) -> ShardIndex:
    """Read the index and check its hash, columns and row counts against the manifest, the tars aside.

    Raises:
        UserError: the index does not match the manifest.
    """
    path = folder / INDEX_NAME
    content = path.read_bytes()
    listed = next(entry for entry in manifest.files if entry.name == INDEX_NAME)
    found = hashlib.sha256(content).hexdigest()
    if found != listed.sha256:
        raise UserError(
            f"{path}: sha256 {found[:16]}, the manifest says {listed.sha256[:16]}. The index was changed or "
            "damaged: copy the folder again from its source, or pack it again."
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as columns:
        index = ShardIndex(**{name: columns[name] for name in COLUMN_DTYPES})
    rows = np.bincount(index.shard, minlength=len(manifest.shards)).tolist()
    expected = [shard.rows for shard in manifest.shards]
    if rows != expected:
        raise UserError(
            f"{path}: {sum(rows)} rows over {len(rows)} shards, the manifest says {sum(expected)} over "
            f"{len(expected)}. Pack the folder again."
        )
    return index


def write_index(file: BinaryIO, column: Callable[[str], npt.NDArray[Any]]) -> None:
    """Write the npz, one column in memory at a time, with fixed dates so that equal rows give equal bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, dtype in COLUMN_DTYPES.items():
            values = column(name)
            assert values.dtype == dtype and values.ndim == 1, (name, values.dtype, values.shape)
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(member, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, values, version=(1, 0), allow_pickle=False)


assert [field.name for field in fields(ShardIndex)] == list(COLUMN_DTYPES)
