"""One Zarr shard file: written row by row as zarr-python would write it, read straight into a batch.

A file of inner chunks of one row with codecs `bytes` and `crc32c` is [row | crc] [row | crc] ... [index |
crc], the index being a uint64 pair (offset, bytes) per row, all ones for an absent row (Zarr v3, codec
sharding_indexed).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_tools.crc import crc32c, crc32c_join, crc32c_rows
from cache_tools.errors import CacheCorrupt
from cache_tools.format import CRC_BYTES, ArrayLayout, partial_path
from common.errors import UserError

Bytes = npt.NDArray[np.uint8]
ABSENT = np.uint64(2**64 - 1)
IOVEC_MAX = 1024
# Bytes read before they are checked: about what stays in a core's second-level cache.
READ_AHEAD_BYTES = 1 << 20
REPAIR = "Run `python -m cache_tools repair` on the cache and build again: only the damaged shards are rebuilt."


@dataclass(frozen=True)
class FileRecord:
    """What a commit record says of a file.

    Attributes:
        bytes: its size.
        crc32c: checksum of its rows' bytes one after the other, without the stored checksums: a CRC over data that
            carry their own CRC is a constant, whatever the data.
        head: checksum of its first row, which tells a file of another shard at the first read.
    """

    bytes: int
    crc32c: int
    head: int

    def to_json(self) -> dict[str, int]:
        """Return a dictionary."""
        return {"bytes": self.bytes, "crc32c": self.crc32c, "head": self.head}

    @staticmethod
    def from_json(value: dict[str, Any]) -> FileRecord:
        """Read what `to_json` wrote."""
        return FileRecord(int(value["bytes"]), int(value["crc32c"]), int(value["head"]))


def write_all(fd: int, buffers: Sequence[memoryview]) -> None:
    """Write every byte of `buffers`; the kernel may take less than it is given."""
    pending = [buffer for buffer in buffers if buffer.nbytes]
    while pending:
        written = os.writev(fd, pending[:IOVEC_MAX])
        while pending and written >= pending[0].nbytes:
            written -= pending.pop(0).nbytes
        if written:
            pending[0] = pending[0][written:]


def read_all(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Fill `buffers` from `offset` on and return the bytes read: fewer than asked only at the end of the file."""
    pending = [buffer for buffer in buffers if buffer.nbytes]
    total = 0
    while pending:
        read = os.preadv(fd, pending[:IOVEC_MAX], offset + total)
        if read == 0:
            break
        total += read
        while pending and read >= pending[0].nbytes:
            read -= pending.pop(0).nbytes
        if read:
            pending[0] = pending[0][read:]
    return total


def index_bytes(array: ArrayLayout, *, rows: int, capacity: int) -> Bytes:
    """Return the end of a shard file: the index of `rows` rows from its start on, and the index's checksum."""
    index = np.full((capacity, 2), ABSENT, np.uint64)
    stride = array.row_bytes + CRC_BYTES
    index[:rows, 0] = np.arange(rows, dtype=np.uint64) * np.uint64(stride)
    index[:rows, 1] = stride
    data = index.astype("<u8").view(np.uint8).reshape(-1)
    return np.concatenate([data, np.frombuffer(crc32c(data).to_bytes(CRC_BYTES, "little"), np.uint8)])


class ShardFileWriter:
    """Writes one array's rows of one tar shard; nothing has the final name before `close`."""

    def __init__(self, path: Path, array: ArrayLayout, *, capacity: int):
        self.path = path
        self.array = array
        self.capacity = capacity
        self.rows = 0
        self._bytes = 0
        self._crc = 0
        self._head = 0
        self._fd = os.open(partial_path(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def append(self, rows: Bytes) -> None:
        """Write the next rows, uint8 [m, row_bytes]. Raises UserError where the disk refuses."""
        assert rows.shape[1] == self.array.row_bytes and self.rows + len(rows) <= self.capacity
        crcs = crc32c_rows(rows)
        words = crcs.astype("<u4").view(np.uint8).reshape(-1, CRC_BYTES)
        if self.rows == 0 and len(rows):
            self._head = int(crcs[0])
        self._put([memoryview(part) for row, word in zip(rows, words, strict=True) for part in (row, word)])
        for crc in crcs.tolist():
            self._crc = crc32c_join(self._crc, crc, self.array.row_bytes)
        self.rows += len(rows)

    def append_whole(self, rows: Bytes) -> None:
        """Write all rows of an array whose chunk is the tar shard; rows short of the capacity are zeros."""
        chunk = np.zeros((self.capacity, self.array.row_bytes), np.uint8)
        chunk[: len(rows)] = rows
        self._crc = self._head = crc32c(chunk)
        word = np.frombuffer(self._crc.to_bytes(CRC_BYTES, "little"), np.uint8)
        self._put([memoryview(chunk.reshape(-1)), memoryview(word)])
        self.rows = len(rows)

    def close(self) -> FileRecord:
        """Write the index, make the file durable and name it. The folder is the caller's to sync."""
        if self.array.per_row:
            self._put([memoryview(index_bytes(self.array, rows=self.rows, capacity=self.capacity))])
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._refused(error) from error
        os.close(self._fd)
        self._fd = -1
        partial_path(self.path).replace(self.path)
        return FileRecord(self._bytes, self._crc, self._head)

    def abort(self) -> None:
        """Remove what was written; does nothing after `close`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            partial_path(self.path).unlink(missing_ok=True)

    def _put(self, buffers: list[memoryview]) -> None:
        try:
            write_all(self._fd, buffers)
        except OSError as error:
            raise self._refused(error) from error
        self._bytes += sum(buffer.nbytes for buffer in buffers)

    def _refused(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path}: writing row {self.rows} failed: {error.strerror} (errno {error.errno}). The shard was "
            "not committed, and finished shards are kept. Free some space, or mend the disk, and run the same "
            "build again."
        )


class ShardFile:
    """An open shard file whose size, index and first row have been checked against its commit record.

    Reading uses preadv, which has no file position, so threads share it; the descriptor is closed when the
    last holder lets go of it.
    """

    def __init__(self, path: Path, array: ArrayLayout, *, rows: int, capacity: int, record: FileRecord):
        self.path = path
        self.array = array
        self.rows = rows
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise CacheCorrupt(f"{path}: missing, though its shard was committed. {REPAIR}") from error
        size = os.fstat(self._fd).st_size
        if size != record.bytes or size != array.file_bytes(rows, capacity):
            raise CacheCorrupt(f"{path}: {size} bytes, {record.bytes} were committed. {REPAIR}")
        tail = index_bytes(array, rows=rows, capacity=capacity)
        found = np.empty_like(tail)
        read_all(self._fd, [memoryview(found)], size - tail.size)
        if not np.array_equal(found, tail):
            raise CacheCorrupt(f"{path}: the index at its end is not that of {rows} rows. {REPAIR}")
        head = np.zeros(CRC_BYTES, np.uint8)
        read_all(self._fd, [memoryview(head)], array.row_bytes if rows else size)
        if int(head.view("<u4")[0]) != record.head:
            raise CacheCorrupt(
                f"{path}: first row's checksum {int(head.view('<u4')[0]):08x}, {record.head:08x} was "
                f"committed: the file of another shard or another build. {REPAIR}"
            )

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read(self, rows: npt.NDArray[np.int64], out: Bytes, slots: npt.NDArray[np.int64], *, check: bool) -> None:
        """Read `rows` into `out[slots]`.

        Args:
            rows: places in the shard, ascending is fastest, int64 [m].
            out: uint8 [slots, row_bytes].
            slots: int64 [m].
            check: verify each row's crc32c; raises CacheCorrupt naming row and file.
        """
        stride = self.array.row_bytes + CRC_BYTES
        most = max(1, min(IOVEC_MAX // 2, READ_AHEAD_BYTES // stride))
        words = np.empty((len(rows), CRC_BYTES), np.uint8)
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        unchecked = 0
        for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
            for start in range(first, last, most):
                stop = min(start + most, last)
                views = [memoryview(part) for i in range(start, stop) for part in (out[slots[i]], words[i])]
                read = read_all(self._fd, views, int(rows[start]) * stride)
                if read != (stop - start) * stride:
                    raise CacheCorrupt(f"{self.path}: ends within row {rows[start]}. {REPAIR}")
                if check and (stop == len(rows) or (stop - unchecked) * stride >= READ_AHEAD_BYTES):
                    self._check(rows[unchecked:stop], out, slots[unchecked:stop], words[unchecked:stop])
                    unchecked = stop

    def _check(self, rows: npt.NDArray[np.int64], out: Bytes, slots: npt.NDArray[np.int64], words: Bytes) -> None:
        stored, found = words.view("<u4")[:, 0], crc32c_rows(out, slots)
        if not np.array_equal(stored, found):
            i = int(np.flatnonzero(stored != found)[0])
            raise CacheCorrupt(
                f"{self.path}: row {rows[i]} has crc32c {found[i]:08x}, its stored checksum is {stored[i]:08x}. The "
                f"bytes changed on disk. {REPAIR}"
            )

    def advise(self, rows: npt.NDArray[np.int64]) -> None:
        """Ask the kernel to read `rows` ahead, in runs of neighbours."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        stride = self.array.row_bytes + CRC_BYTES
        rows = np.sort(rows)
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            os.posix_fadvise(self._fd, int(run[0]) * stride, len(run) * stride, os.POSIX_FADV_WILLNEED)

    def content_crc32c(self) -> int:
        """Read and check every row; return the checksum of their bytes, as `FileRecord.crc32c` has it."""
        row = np.empty((1, self.array.row_bytes), np.uint8)
        slot, crc = np.zeros(1, np.int64), 0
        for place in range(self.rows):
            self.read(np.array([place]), row, slot, check=True)
            crc = crc32c_join(crc, int(crc32c_rows(row)[0]), self.array.row_bytes)
        return crc


def read_whole(path: Path, array: ArrayLayout, *, rows: int, capacity: int, record: FileRecord) -> Bytes:
    """Read and check an array whose chunk is the tar shard; uint8 [rows, row_bytes]."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CacheCorrupt(f"{path}: missing, though its shard was committed. {REPAIR}") from error
    expected = array.file_bytes(rows, capacity)
    if len(data) != expected or len(data) != record.bytes:
        raise CacheCorrupt(f"{path}: {len(data)} bytes, {record.bytes} were committed. {REPAIR}")
    found = crc32c(data[:-CRC_BYTES])
    if found != int.from_bytes(data[-CRC_BYTES:], "little") or found != record.head:
        raise CacheCorrupt(f"{path}: crc32c {found:08x}, {record.head:08x} was committed. {REPAIR}")
    return np.frombuffer(data, np.uint8, rows * array.row_bytes).reshape(rows, array.row_bytes)


class OpenFiles:
    """The shard files used last, at most `limit` of them open."""

    def __init__(self, limit: int):
        self.limit = limit
        self._files: OrderedDict[Path, ShardFile] = OrderedDict()
        self._lock = Lock()

    def get(self, path: Path, array: ArrayLayout, *, rows: int, capacity: int, record: FileRecord) -> ShardFile:
        """Return the open file at `path`. A file that is evicted while a thread reads it lives until it is done."""
        with self._lock:
            file = self._files.get(path)
            if file is not None:
                self._files.move_to_end(path)
                return file
        file = ShardFile(path, array, rows=rows, capacity=capacity, record=record)
        with self._lock:
            file = self._files.setdefault(path, file)
            self._files.move_to_end(path)
            while len(self._files) > self.limit:
                self._files.popitem(last=False)
        return file

    def close(self) -> None:
        """Let go of every file."""
        with self._lock:
            self._files.clear()
