"""Tar at the level of 512-byte blocks: write samples in webdataset's layout, walk members strictly."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

BLOCK = 512
RECORD = tarfile.RECORDSIZE  # a tar's length is a multiple of this

# What webdataset's TarWriter sets in every header, with mtime 0.
_MODE, _OWNER = 0o444, "bigdata"

Read = Callable[[int, int], bytes]  # (offset, size) -> bytes, fewer only at the end of the file


class TarDamage(ValueError):
    """A tar that breaks the format; the message says what, and at which byte."""


class _Sink(Protocol):
    def write(self, data: bytes, /) -> object: ...


@dataclass(frozen=True)
class TarMember:
    """A regular file in a tar: its name, the offset of its data and its size in bytes."""

    name: str
    offset: int
    size: int


def padded(size: int) -> int:
    """Return a size rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def member_header(name: str, size: int) -> bytes:
    """Return the 512-byte ustar header of a member: the one byte sequence for a name and a size."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = _MODE
    info.uname = info.gname = _OWNER
    return info.tobuf(tarfile.USTAR_FORMAT)


def _member(name: str, data: bytes) -> list[bytes]:
    return [member_header(name, len(data)), data, bytes(padded(len(data)) - len(data))]


class SampleWriter:
    """Writes samples as `{key}.cls`, `{key}.jpg`, `{key}.json`, byte for byte as webdataset's TarWriter.

    webdataset itself is not used: importing it imports torch, 290 MB of private memory a process.
    """

    def __init__(self, sink: _Sink) -> None:
        """Write to `sink`, from offset 0."""
        self._sink = sink
        self._offset = 0

    def write(self, key: str, *, cls: bytes, jpg: bytes, json: bytes) -> int:
        """Append one sample and return the offset of its JPEG."""
        blocks = b"".join(
            _member(f"{key}.cls", cls) + _member(f"{key}.jpg", jpg) + _member(f"{key}.json", json)
        )
        self._sink.write(blocks)
        jpeg_offset = self._offset + BLOCK + padded(len(cls)) + BLOCK
        self._offset += len(blocks)
        return jpeg_offset

    def close(self) -> None:
        """Write the end of the archive; the sink stays open."""
        self._sink.write(end_of_archive(self._offset))


def end_of_archive(offset: int) -> bytes:
    """Return the zeros that end an archive: two blocks from `offset`, then up to a whole record."""
    end = offset + 2 * BLOCK
    return bytes(2 * BLOCK + (-end % RECORD))


def walk_members(read: Read, *, start: int = 0, end: int) -> Iterator[TarMember]:
    """Yield the regular files of the tar that lies in bytes [start, end), reading headers alone.

    Names in GNU long-name and pax headers are understood; links, folders and devices are passed over.

    Raises:
        TarDamage: a checksum is wrong, a member passes the end, or the end-of-archive mark is missing.
    """
    offset, long_name = start, None
    while True:
        header = read(offset, BLOCK)
        if len(header) < BLOCK or offset + BLOCK > end:
            raise TarDamage(f"no end-of-archive mark at byte {offset}: the tar was cut")
        if not header.strip(b"\0"):
            return
        size, kind = _parse_header(header, offset)
        data = offset + BLOCK
        if data + size > end:
            raise TarDamage(f"the member at byte {offset} ends at {data + size}, the tar at {end}: cut short")
        if kind == b"L":
            long_name = read(data, size).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind == b"x":
            long_name = _pax_path(read(data, size), offset) or long_name
        elif kind in (b"0", b"\0", b"7"):
            yield TarMember(long_name or _short_name(header), data, size)
            long_name = None
        elif kind != b"g":
            long_name = None
        offset = data + padded(size)


def _parse_header(header: bytes, offset: int) -> tuple[int, bytes]:
    """Return the size and the type of a member after checking the header's checksum."""
    stored = _number(header[148:156], offset)
    if stored != sum(header) - sum(header[148:156]) + 8 * 0x20:
        raise TarDamage(f"the header at byte {offset} does not match its checksum")
    return _number(header[124:136], offset), header[156:157]


def _number(field: bytes, offset: int) -> int:
    if field[0] & 0x80:  # GNU's base-256, for sizes of 8 GiB and more
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise TarDamage(f"the header at byte {offset} holds the number {field!r}") from error


def _short_name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _pax_path(records: bytes, offset: int) -> str | None:
    path = None
    while records:
        length, _, _ = records.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(records):
            raise TarDamage(f"the pax header at byte {offset} is malformed")
        record, records = records[: int(length)], records[int(length) :]
        name, _, value = record[len(length) + 1 : -1].partition(b"=")
        if name == b"path":
            path = value.decode("utf-8", "surrogateescape")
        elif name == b"size":
            raise TarDamage(f"the pax header at byte {offset} gives a size: a member of over 8 GiB")
    return path
