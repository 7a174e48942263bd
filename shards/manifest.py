"""The shard folder on disk: file names, keys, row flags, the manifest, the index and the layout of a sample."""

from __future__ import annotations

import enum
import hashlib
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, get_args, get_type_hints

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.files import canonical_json, file_sha256, json_sha256

FORMAT_VERSION = 1
MANIFEST_NAME, INDEX_NAME = "manifest.json", "index.npz"
CLASSES_NAME, QUARANTINE_NAME = "classes.json", "quarantine.jsonl"
SOURCE_NAME = "source.json"  # what the folder was packed from, with times: not in the manifest, nor the fingerprint
WORK_FOLDER = ".packing"

UNKNOWN_LABEL = -1
MAX_KEY_LENGTH = 64  # with a suffix of 17 and ".json" still inside ustar's 100 bytes
BLOCK = tarfile.BLOCKSIZE

_REBUILD = "It was changed or damaged: copy the folder again from its source, or pack it again."


class RowFlag(enum.IntFlag):
    """What the index's `flags` say of a row's JPEG. No bit of the second half: stored byte for byte."""

    GRAY = 1  # one component; decodes to RGB on request
    PROGRESSIVE = 2
    TRAILING_BYTES = 4  # bytes after the end-of-image marker, kept; decoders stop before them
    RENAMED = 8  # the key is not the plain name: a character outside the rule, too long, or a name met twice
    REENCODED = 256  # decoded and stored as RGB JPEG, quality 95, 4:4:4
    ROTATED = 512  # an EXIF orientation was applied to the pixels
    DOWNSCALED = 1024  # stored at 1/2, 1/4 or 1/8 of the size, being over the limit
    EOI_ADDED = 2048  # an earlier version appended a missing end-of-image marker
    WARNED = 4096  # the decoder warned of the picture; kept by request, damage may show
    MENDED = 8192  # an earlier version freed it of stray bytes outside the picture


@dataclass(frozen=True)
class FileEntry:
    """A file of the shard folder: its name, size in bytes and sha256 in hex."""

    name: str
    bytes: int
    sha256: str

    def is_whole_in(self, folder: Path) -> bool:
        """Tell whether the file is there with that size and hash."""
        path = folder / self.name
        return path.is_file() and path.stat().st_size == self.bytes and file_sha256(path) == self.sha256


@dataclass(frozen=True)
class ShardEntry(FileEntry):
    """A tar of the shard folder and the number of its rows."""

    rows: int


@dataclass(frozen=True)
class Manifest:
    """All that a reader needs to know of a shard folder before it opens a tar."""

    format_version: int
    rows_per_shard: int  # source images planned a shard; quarantined ones leave a shard with fewer rows
    seed: int  # of the order of rows
    class_names: tuple[str, ...]  # in label order; empty where images have no labels
    policy: Mapping[str, Any]  # what was done to images, with the versions of the libraries that did it
    source: Mapping[str, Any]  # kind, number of images and bytes of what was packed, and the sha256 of its listing
    counts: Mapping[str, int]  # rows by what happened to them (reencoded, renamed, quarantined, ...)
    shards: tuple[ShardEntry, ...]  # in row order: row r of shard k is row sum(rows of shards before k) + r
    files: tuple[FileEntry, ...]  # the other files of the folder

    @property
    def num_rows(self) -> int:
        """Number of rows over all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where images have no labels."""
        return len(self.class_names)

    def counts_text(self) -> str:
        """Return what became of the images, as a sentence has it."""
        words = {"verbatim": "kept byte for byte", "quarantined for a warning": "of these for a warning"}
        return ", ".join(
            f"{count} {words.get(name, name.replace('re-encoded: ', 're-encoded from '))}"
            for name, count in self.counts.items()
        )

    def fingerprint(self) -> str:
        """Return the sha256, in hex, of the canonical manifest: equal iff all files are equal to the byte."""
        return json_sha256(asdict(self))

    def to_json(self) -> bytes:
        """Return the text of `manifest.json`: the fields and, last, their fingerprint."""
        return (json.dumps(asdict(self) | {"fingerprint": self.fingerprint()}, indent=1) + "\n").encode()


def load_manifest(shards_dir: str | Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        UserError: there is none, packing is unfinished, it is of another format, or it was changed.
    """
    folder = Path(shards_dir)
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Pack images first: `make shards DATA=... SHARDS=...`.")
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        if (folder / WORK_FOLDER).is_dir():
            message = "packing is not finished. Run the same pack command again: it continues."
        else:
            message = f"holds no {MANIFEST_NAME}. Give a folder made by `make shards DATA=... SHARDS=...`."
        raise UserError(f"{folder}: {message}") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}). {_REBUILD}") from error
    if not isinstance(content, dict) or "format_version" not in content:
        raise UserError(f"{path}: not a shard manifest (no format_version). {_REBUILD}")
    if content["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {content['format_version']!r}, this program reads {FORMAT_VERSION}. "
            "Pack again with this version, or use the version that packed it."
        )
    fingerprint = content.pop("fingerprint", None)
    try:
        shards = tuple(ShardEntry(**entry) for entry in content.pop("shards"))
        files = tuple(FileEntry(**entry) for entry in content.pop("files"))
        manifest = Manifest(shards=shards, files=files, class_names=tuple(content.pop("class_names")), **content)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: fields missing or unknown ({error}). {_REBUILD}") from error
    found = manifest.fingerprint()
    if found != fingerprint:
        raise UserError(f"{path}: its content hashes to {found[:16]}, it says {str(fingerprint)[:16]}. {_REBUILD}")
    assert all(re.fullmatch(r"shard-\d{6,}\.tar", shard.name) for shard in shards), shards
    return manifest


def check_files(shards_dir: Path, manifest: Manifest) -> None:
    """Check that every listed file is there with its size, or UserError; contents are left to `verify`."""
    for entry in (*manifest.files, *manifest.shards):
        path = shards_dir / entry.name
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            message = f"missing, though the manifest lists it with {entry.bytes} bytes"
            raise UserError(f"{path}: {message}. {_REBUILD}") from error
        if size != entry.bytes:
            raise UserError(f"{path}: {size} bytes, the manifest says {entry.bytes}. {_REBUILD}")


@dataclass(frozen=True)
class ShardIndex:
    """One entry a row, in row order; every column is [N]."""

    shard: npt.NDArray[np.int32]  # position in the manifest's `shards`, not the number in the file name
    offset: npt.NDArray[np.int64]  # byte offset of the JPEG in its tar; its tar header is the 512 bytes before it
    size: npt.NDArray[np.int64]  # bytes of the JPEG
    height: npt.NDArray[np.int32]  # pixels
    width: npt.NDArray[np.int32]  # pixels
    label: npt.NDArray[np.int32]  # class, -1 where unknown
    uid: npt.NDArray[np.uint64]  # `name_uid` of the original relative name
    crc32c: npt.NDArray[np.uint32]  # of the JPEG's bytes
    flags: npt.NDArray[np.uint32]  # `RowFlag`

    def __len__(self) -> int:
        return len(self.shard)


# np.int32 of npt.NDArray[np.int32], which is np.ndarray[..., np.dtype[np.int32]].
COLUMN_DTYPES = {name: get_args(get_args(array)[1])[0] for name, array in get_type_hints(ShardIndex).items()}


def load_index(shards_dir: str | Path) -> ShardIndex:
    """Read the index, checked against the manifest; every listed file must be there with its size.

    Raises:
        UserError: a file is missing, cut, or changed; the message names it.
    """
    manifest = load_manifest(shards_dir)
    check_files(Path(shards_dir), manifest)
    return read_index(Path(shards_dir), manifest)


def read_index(folder: Path, manifest: Manifest) -> ShardIndex:
    """Read the index; UserError where hash or row counts are not the manifest's. The tars are not looked at."""
    path = folder / INDEX_NAME
    content = path.read_bytes()
    listed = next(entry.sha256 for entry in manifest.files if entry.name == INDEX_NAME)
    found = hashlib.sha256(content).hexdigest()
    if found != listed:
        raise UserError(
            f"{path}: sha256 {found[:16]}, the manifest says {listed[:16]}. The index was changed or "
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


def name_uid(name: str) -> int:
    """Return the 64-bit id of a sample: blake2b-8, little endian, of its original relative name."""
    return int.from_bytes(name_digest(name), "little")


def name_digest(name: str) -> bytes:
    """Return the 8 bytes of `name_uid`. Names that are not UTF-8 keep their bytes."""
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def plain_key(name: str) -> tuple[str, bool]:
    """Make the tar key of a name, and tell whether a character had to be replaced or the end cut off.

    A dot would split the key silently in webdataset and in DALI, so keys hold `[A-Za-z0-9_-]` alone.
    `n01440764/n01440764_10026.JPEG` gives `n01440764_10026`; `cats/a.b.png` gives `cats-a_b`.
    """
    *folders, file_name = name.split("/")
    stem = file_name.rpartition(".")[0] or file_name
    if folders and stem.startswith(folders[-1] + "_"):
        folders = folders[:-1]
    readable = "-".join([*folders, stem])
    key = re.sub(r"[^A-Za-z0-9_-]", "_", readable)[:MAX_KEY_LENGTH] or "_"
    return key, key != readable


def unique_key(name: str) -> str:
    """Make the tar key of a name whose plain key is another name's too: the plain key and the id in hex."""
    return f"{plain_key(name)[0]}-{name_uid(name):016x}"


def is_key(text: str) -> bool:
    """Tell whether a text keeps the key rule."""
    return re.fullmatch(r"[A-Za-z0-9_-]+", text) is not None


def padded(size: int) -> int:
    """Return a size rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def open_tar(file: BinaryIO) -> tarfile.TarFile:
    """Open a file, from where it stands, to write samples into; closing the tar leaves the file open."""
    return tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)


def add_sample(tar: tarfile.TarFile, key: str, *, cls: bytes, jpg: bytes, json: bytes) -> int:
    """Append `{key}.cls`, `{key}.jpg`, `{key}.json`, byte for byte as webdataset's TarWriter; return the JPEG's offset.

    webdataset itself is not used: importing it imports torch, 290 MB of private memory a process.
    """
    offset = tar.offset + BLOCK + padded(len(cls)) + BLOCK
    for suffix, data in (("cls", cls), ("jpg", jpg), ("json", json)):
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size, info.mode, info.uname, info.gname = len(data), 0o444, "bigdata", "bigdata"  # as TarWriter sets them
        tar.addfile(info, io.BytesIO(data))
    tar.members = []  # type: ignore[attr-defined]  # tarfile keeps them, and nobody reads them
    return offset


def sample_json(name: str, class_name: str, height: int, width: int) -> bytes:
    """Return the bytes of a sample's `.json`; `class_name` is empty where unknown."""
    return canonical_json({"name": name, "wnid": class_name, "width": width, "height": height})
