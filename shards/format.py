"""The shard folder on disk: file names, the key rule, row flags and the manifest."""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.hashing import json_sha256

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npz"
CLASSES_NAME = "classes.json"
QUARANTINE_NAME = "quarantine.jsonl"
WORK_FOLDER = ".packing"

UNKNOWN_LABEL = -1
MAX_KEY_LENGTH = 64  # with a suffix of 17 and ".json" still inside ustar's 100 bytes

_REBUILD = "It was changed or damaged: copy the folder again from its source, or pack it again."
_KEY_RULE = re.compile(r"[A-Za-z0-9_-]+")
_OUTSIDE_KEY_RULE = re.compile(r"[^A-Za-z0-9_-]")
_SHARD_NAME = re.compile(r"shard-\d{6,}\.tar")


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


@dataclass(frozen=True)
class ShardEntry(FileEntry):
    """A tar of the shard folder and the number of its rows."""

    rows: int


@dataclass(frozen=True)
class Manifest:
    """All that a reader needs to know of a shard folder before it opens a tar.

    Attributes:
        format_version: version of this layout.
        rows_per_shard: source images planned a shard; quarantined ones leave a shard with fewer rows.
        seed: seed of the order of rows.
        class_names: class of each label, in label order; empty where images have no labels.
        policy: what was done to images, with the versions of the libraries that did it.
        source: kind, number of images and bytes of what was packed, and the sha256 of its listing.
        counts: rows by what happened to them (reencoded, renamed, quarantined, ...).
        shards: the tars in row order. Row r of shard k is row sum(rows of shards before k) + r.
        files: the other files of the folder.
    """

    format_version: int
    rows_per_shard: int
    seed: int
    class_names: tuple[str, ...]
    policy: Mapping[str, Any]
    source: Mapping[str, Any]
    counts: Mapping[str, int]
    shards: tuple[ShardEntry, ...]
    files: tuple[FileEntry, ...]

    @property
    def num_rows(self) -> int:
        """Number of rows over all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where images have no labels."""
        return len(self.class_names)

    def fingerprint(self) -> str:
        """Return the sha256, in hex, of the canonical manifest: equal iff all files are equal to the byte."""
        return json_sha256(asdict(self))

    def to_json(self) -> bytes:
        """Return the text of `manifest.json`: the fields and, last, their fingerprint."""
        fields = asdict(self) | {"fingerprint": self.fingerprint()}
        return (json.dumps(fields, indent=1) + "\n").encode()


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
        fields = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        if (folder / WORK_FOLDER).is_dir():
            message = "packing is not finished. Run the same pack command again: it continues."
        else:
            message = f"holds no {MANIFEST_NAME}. Give a folder made by `make shards DATA=... SHARDS=...`."
        raise UserError(f"{folder}: {message}") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}). {_REBUILD}") from error
    return _parse_manifest(path, fields)


def _parse_manifest(path: Path, fields: Any) -> Manifest:
    if not isinstance(fields, dict) or "format_version" not in fields:
        raise UserError(f"{path}: not a shard manifest (no format_version). {_REBUILD}")
    version = fields["format_version"]
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {version!r}, this program reads {FORMAT_VERSION}. "
            "Pack again with this version, or use the version that packed it."
        )
    fingerprint = fields.pop("fingerprint", None)
    try:
        shards = tuple(ShardEntry(**entry) for entry in fields.pop("shards"))
        files = tuple(FileEntry(**entry) for entry in fields.pop("files"))
        class_names = tuple(fields.pop("class_names"))
        manifest = Manifest(shards=shards, files=files, class_names=class_names, **fields)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: fields missing or unknown ({error}). {_REBUILD}") from error
    if manifest.fingerprint() != fingerprint:
        raise UserError(
            f"{path}: its content hashes to {manifest.fingerprint()[:16]}, "
            f"it says {str(fingerprint)[:16]}. {_REBUILD}"
        )
    for shard in manifest.shards:
        assert _SHARD_NAME.fullmatch(shard.name), shard.name
    return manifest


def check_files(shards_dir: Path, manifest: Manifest) -> None:
    """Check that every file of the manifest is there with its size; contents are left to `verify`.

    Raises:
        UserError: a file is missing or has another size.
    """
    for entry in (*manifest.files, *manifest.shards):
        path = shards_dir / entry.name
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise UserError(
                f"{path}: missing, though the manifest lists it with {entry.bytes} bytes. {_REBUILD}"
            ) from error
        if size != entry.bytes:
            raise UserError(f"{path}: {size} bytes, the manifest says {entry.bytes}. {_REBUILD}")


def shard_name(number: int) -> str:
    """Return the file name of the shard of that number in the plan."""
    return f"shard-{number:06d}.tar"


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
    key = _OUTSIDE_KEY_RULE.sub("_", readable)[:MAX_KEY_LENGTH] or "_"
    return key, key != readable


def unique_key(name: str) -> str:
    """Make the tar key of a name whose plain key is another name's too: the plain key and the id in hex."""
    return f"{plain_key(name)[0]}-{name_uid(name):016x}"


def is_key(text: str) -> bool:
    """Tell whether a text keeps the key rule."""
    return _KEY_RULE.fullmatch(text) is not None
