"""Tars by Python's own `tarfile`: samples in webdataset's layout, and the members of a source's tars in place."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE

# What webdataset's TarWriter sets in every header, with mtime 0.
_MODE, _OWNER = 0o444, "bigdata"


class TarDamage(ValueError):
    """A tar that breaks the format; the message says what, and at which byte."""


@dataclass(frozen=True)
class TarMember:
    """A regular file in a tar: its name, the offset of its data and its size in bytes."""

    name: str
    offset: int
    size: int


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
        info.size, info.mode, info.uname, info.gname = len(data), _MODE, _OWNER, _OWNER
        tar.addfile(info, io.BytesIO(data))
    tar.members = []  # type: ignore[attr-defined]  # tarfile keeps them, and nobody reads them
    return offset


def walk_members(file: BinaryIO, *, start: int = 0, end: int) -> Iterator[TarMember]:
    """Yield the regular files of the tar that lies in bytes [start, end) of a file, reading headers alone.

    Raises:
        TarDamage: a header is damaged, a member passes the end, or the end-of-archive mark is missing.
    """
    file.seek(start)
    try:
        tar = tarfile.TarFile(fileobj=file, mode="r", encoding="utf-8", errors="surrogateescape")
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or a million of them would be kept
            if member.offset_data + member.size > end:
                last = member.offset_data + member.size
                raise TarDamage(f"the member at byte {member.offset} ends at {last}, the tar at {end}: cut short")
            if member.isreg() and not member.issparse():
                yield TarMember(member.name, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise TarDamage(f"{error}: cut or damaged") from error
    # tarfile takes a damaged header for the end; the end is a block of zeros.
    file.seek(tar.offset)
    block = file.read(BLOCK)
    if len(block) < BLOCK or tar.offset + BLOCK > end:
        raise TarDamage(f"no end-of-archive mark at byte {tar.offset}: the tar was cut")
    if block.strip(b"\0"):
        raise TarDamage(f"the header at byte {tar.offset} does not match its checksum")
