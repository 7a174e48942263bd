"""What lies where in a cache: arrays, chunk files, Zarr metadata; how files are put in place; what can be wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from common.errors import UserError
from common.files import open_atomic, sync_folder
from common.locks import file_lock

RESTORE = (
    "`python -m cache_tools repair` restores it from a copy in the cache, if that is sound; else copy the cache again, "
    "or build it again."
)
REPAIR = "Run `python -m cache_tools repair` on the cache and build again: only the damaged shards are rebuilt."


class CacheMismatch(UserError):
    """The cache was made from another teacher, seed, codec, augmentation or set of shards."""


class CacheIncomplete(UserError):
    """Some tar shards have no commit record: the build has not finished."""


class CacheStale(UserError):
    """A row no longer belongs to its image: the JPEG or its crops changed after the cache was built."""


class CacheCorrupt(UserError):
    """A file is missing, cut short, altered, or is not the one that was committed."""


FORMAT_VERSION = 1
CodecName = Literal["int8", "fp16"]
CODECS: tuple[CodecName, ...] = ("int8", "fp16")
CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
ATTRIBUTE = "teacher_cache"
# Metadata that no other chunk layout of the same arrays has otherwise.
UNCHANGEABLE_FIELDS = ("shape", "data_type", "zarr_format", "node_type")


@dataclass(frozen=True)
class ArrayLayout:
    """One Zarr array of a view set.

    Attributes:
        name: name in the view set's group.
        dtype: numpy name of the stored type, little-endian.
        tail: shape of one row.
        per_row: True for one inner chunk a row within a Zarr shard; False for one chunk a tar shard.
    """

    name: str
    dtype: str
    tail: tuple[int, ...]
    per_row: bool

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.tail, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def file_bytes(self, rows: int, capacity: int) -> int:
        """Bytes of the file of a tar shard that holds `rows` of at most `capacity` rows."""
        if self.per_row:
            return rows * (self.row_bytes + CRC_BYTES) + capacity * INDEX_ENTRY_BYTES + CRC_BYTES
        return capacity * self.row_bytes + CRC_BYTES


@dataclass(frozen=True)
class CacheSpec:
    """Shape and codec of a cache.

    Attributes:
        shard_rows: rows of each tar shard, in order; their largest is the capacity R of every Zarr shard.
        num_crops: global crops g of an image.
        num_patches: patch tokens n of a crop.
        embed_dim: width d of a token.
        codec: "int8" or "fp16".
    """

    shard_rows: tuple[int, ...]
    num_crops: int
    num_patches: int
    embed_dim: int
    codec: CodecName

    @property
    def num_shards(self) -> int:
        """Number S of tar shards."""
        return len(self.shard_rows)

    @property
    def num_rows(self) -> int:
        """Rows in all shards."""
        return sum(self.shard_rows)

    @property
    def capacity(self) -> int:
        """Rows R of the largest shard."""
        return max(self.shard_rows)

    def arrays(self) -> tuple[ArrayLayout, ...]:
        """Return the arrays of a view set."""
        g, n, d = self.num_crops, self.num_patches, self.embed_dim
        coded = (
            (ArrayLayout("patch", "int8", (g, n, d), True), ArrayLayout("scale", "float16", (g, n), True))
            if self.codec == "int8"
            else (ArrayLayout("patch", "float16", (g, n, d), True),)
        )
        return (
            *coded,
            ArrayLayout("cls", "float16", (g, d), True),
            ArrayLayout("id", "uint8", (16,), False),
            ArrayLayout("img_crc", "uint32", (), False),
            ArrayLayout("crop", "int32", (g, 6), False),
        )

    def view_set_bytes(self) -> int:
        """Bytes of all files of one view set."""
        return sum(a.file_bytes(rows, self.capacity) for a in self.arrays() for rows in self.shard_rows)

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary for the group's attributes."""
        return asdict(self) | {"shard_rows": list(self.shard_rows)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> CacheSpec:
        """Read what `to_json` wrote."""
        codec = value["codec"]
        if codec not in CODECS:
            raise UserError(f"codec {codec!r} is unknown to this version; it knows {', '.join(CODECS)}.")
        return CacheSpec(
            shard_rows=tuple(int(rows) for rows in value["shard_rows"]),
            num_crops=int(value["num_crops"]),
            num_patches=int(value["num_patches"]),
            embed_dim=int(value["embed_dim"]),
            codec=cast(CodecName, codec),
        )


@dataclass(frozen=True)
class Paths:
    """Where the files of a cache are."""

    root: Path

    @property
    def data(self) -> Path:
        """The Zarr group."""
        return self.root / "data.zarr"

    @property
    def manifest(self) -> Path:
        """The list of finished view sets, derived from the commit records."""
        return self.root / "manifest.json"

    def view(self, view_set: int) -> Path:
        """The Zarr group of a view set."""
        return self.data / f"v{view_set}"

    def chunk(self, view_set: int, array: ArrayLayout, shard: int) -> Path:
        """The file of one array for one tar shard."""
        zeros = ".".join(["0"] * (1 + len(array.tail)))
        return self.view(view_set) / array.name / f"c.{shard}.{zeros}"

    def commits(self, view_set: int) -> Path:
        """The folder of a view set's commit records."""
        return self.root / "commit" / f"v{view_set}"

    def commit(self, view_set: int, shard: int) -> Path:
        """The commit record of one tar shard."""
        return self.commits(view_set) / f"{shard:06d}.json"

    def view_sets(self) -> list[int]:
        """Numbers of the view sets that exist, finished or not."""
        return sorted(int(path.name[1:]) for path in self.data.glob("v*") if path.name[1:].isdigit())


@contextmanager
def cache_lock(root: Path) -> Iterator[None]:
    """Hold the right to write what is not a shard's own: the layout and the manifest. Waits for it."""
    with file_lock(root / ".lock"):
        yield


def partial_path(path: Path) -> Path:
    """Return the name under which a file or folder of the cache is written.

    Its writer holds the lock that covers it, so one name is enough; the next build overwrites what a killed one left.
    """
    return path.with_name(f".{path.name}.partial")


def write_small(path: Path, data: bytes) -> None:
    """Write a small file at once; the caller holds the lock that covers it. Raises UserError where the disk refuses."""
    with open_atomic(path, temporary=partial_path(path)) as file:
        file.write(data)


def array_metadata(array: ArrayLayout, spec: CacheSpec) -> dict[str, Any]:
    """Return the fields of zarr.json on which an array's bytes depend (Zarr v3, sharding_indexed)."""
    chunk = [1, spec.capacity, *array.tail]
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    inner: dict[str, Any] = {"name": "bytes"} if np.dtype(array.dtype).itemsize == 1 else little
    codecs: list[dict[str, Any]] = [inner, {"name": "crc32c"}]
    if array.per_row:
        sharding = {
            "chunk_shape": [1, 1, *array.tail],
            "codecs": codecs,
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    return {
        "shape": [spec.num_shards, spec.capacity, *array.tail],
        "data_type": array.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": codecs,
        "zarr_format": 3,
        "node_type": "array",
    }


def differing_fields(path: Path, array: ArrayLayout, spec: CacheSpec) -> list[str]:
    """Return the metadata fields in which the array on disk differs from the cache's layout."""
    found = read_json(path / "zarr.json")
    return [key for key, value in array_metadata(array, spec).items() if found.get(key) != value]


def metadata_faults(paths: Paths, view_set: int, spec: CacheSpec) -> dict[Path, str]:
    """Return what is wrong with each metadata file of a view set.

    Raises:
        CacheMismatch: an array has another chunk layout.
    """
    group = paths.view(view_set) / "zarr.json"
    faults = {} if group.exists() else {group: f"{group}: missing."}
    for array in spec.arrays():
        path = paths.view(view_set) / array.name / "zarr.json"
        try:
            fields = differing_fields(path.parent, array, spec)
        except CacheCorrupt as error:
            faults[path] = str(error)
            continue
        wrong = [f"{field} is {read_json(path).get(field)!r}" for field in fields if field in UNCHANGEABLE_FIELDS]
        if wrong:
            faults[path] = f"{path}: {', '.join(wrong)}, which does not fit the cache's attributes. {REPAIR}"
        elif fields:
            raise CacheMismatch(
                f"{path}: {', '.join(fields)} are not those of the cache's own layout: it was rechunked or compressed. "
                "zarr-python reads it; for training, copy the original cache again, or build it again."
            )
    return faults


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; CacheCorrupt where it is absent or not one."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CacheCorrupt(
            f"{path}: missing. It was there when the cache was built. Run `python -m cache_tools repair` and "
            "build again, or copy the cache again."
        ) from error
    except (ValueError, UnicodeDecodeError) as error:
        raise CacheCorrupt(
            f"{path}: not JSON ({error}). The file was altered. Run `python -m cache_tools repair` and build again."
        ) from error
    if not isinstance(value, dict):
        raise CacheCorrupt(f"{path}: holds a {type(value).__name__}, not an object. The file was altered.")
    return value


def read_attributes(root: Path) -> dict[str, Any]:
    """Return the cache's attributes: format_version, spec, fingerprint, soft, quality.

    Raises:
        CacheIncomplete: there is no cache at `root`, or its build was stopped before it began to write.
        CacheCorrupt: they are missing or altered.
        CacheMismatch: it was written by another version of the format.
    """
    metadata = Paths(root).data / "zarr.json"
    if not metadata.parent.exists():
        raise CacheIncomplete(
            f"{root}: no teacher cache here (no folder {metadata.parent.name}). Build one with "
            f"`make cache SHARDS=... CACHE={root}`."
        )
    if not metadata.exists():
        raise CacheCorrupt(f"{metadata}: missing. It holds what the cache was made from. {RESTORE}")
    attributes = read_json(metadata).get("attributes", {}).get(ATTRIBUTE)
    if not isinstance(attributes, dict):
        raise CacheCorrupt(f"{metadata}: has no attribute {ATTRIBUTE!r}. This is another Zarr group, not a cache.")
    if attributes.get("format_version") != FORMAT_VERSION:
        raise CacheMismatch(
            f"{root}: cache format {attributes.get('format_version')}, this code reads {FORMAT_VERSION}. "
            "Build the cache again."
        )
    try:
        CacheSpec.from_json(attributes["spec"])
        if not all(isinstance(attributes[name], dict) for name in ("fingerprint", "quality")):
            raise TypeError("fingerprint or quality is no object")
    except (KeyError, TypeError, ValueError) as error:
        raise CacheCorrupt(
            f"{metadata}: its attributes were altered ({error!r}). The rows may well be sound. {RESTORE}"
        ) from error
    return attributes


def create_group(root: Path, attributes: dict[str, Any], codec_arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """Write data.zarr with its attributes and the codec's arrays; does nothing where one exists already."""
    import zarr
    from zarr.codecs import Crc32cCodec

    with _published(root, Paths(root).data) as temporary:
        if temporary is None:
            return
        group = zarr.create_group(store=temporary, attributes={ATTRIBUTE: attributes})
        codec = group.create_group("codec")
        for name, values in codec_arrays.items():
            array = codec.create_array(
                name, shape=values.shape, dtype=values.dtype, chunks=values.shape, compressors=Crc32cCodec()
            )
            array[:] = values


def create_view_set(root: Path, view_set: int, spec: CacheSpec) -> None:
    """Write the group and the array metadata of a view set; does nothing where it exists already."""
    import zarr
    from zarr.codecs import Crc32cCodec

    with _published(root, Paths(root).view(view_set)) as temporary:
        if temporary is None:
            return
        group = zarr.create_group(store=temporary)
        for array in spec.arrays():
            whole = (1, spec.capacity, *array.tail)
            group.create_array(
                array.name,
                shape=(spec.num_shards, spec.capacity, *array.tail),
                dtype=array.dtype,
                chunks=(1, 1, *array.tail) if array.per_row else whole,
                shards=whole if array.per_row else None,
                compressors=Crc32cCodec(),
                fill_value=0,
                chunk_key_encoding={"name": "default", "separator": "."},
            )
            foreign = differing_fields(temporary / array.name, array, spec)
            if foreign:
                raise UserError(
                    f"{array.name}: zarr {zarr.__version__} writes {', '.join(foreign)} in another way than the "
                    "cache's layout. Install the version in requirements.lock."
                )


@contextmanager
def _published(root: Path, final: Path) -> Iterator[Path | None]:
    """Yield a temporary folder that becomes `final` durably and as a whole; None where `final` is there."""
    root.mkdir(parents=True, exist_ok=True)
    with cache_lock(root):
        if final.exists():
            yield None
            return
        temporary = partial_path(root / final.name)
        shutil.rmtree(temporary, ignore_errors=True)
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                fd = os.open(Path(folder) / name, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            sync_folder(Path(folder))
        temporary.rename(final)
        sync_folder(final.parent)
