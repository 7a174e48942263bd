"""One Zarr shard file: written row by row as zarr-python would write it, read straight into a batch; its CRC-32C.

A file of inner chunks of one row with codecs `bytes` and `crc32c` is [row | crc] [row | crc] ... [index |
crc], the index being a uint64 pair (offset, bytes) per row, all ones for an absent row (Zarr v3, codec
sharding_indexed).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import resource
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from cache_tools.commit import Commit, FileRecord
from cache_tools.layout import CRC_BYTES, REPAIR, ArrayLayout, CacheCorrupt, CacheSpec, Paths, partial_path
from common.files import open_atomic

Bytes = npt.NDArray[np.uint8]
ABSENT = np.uint64(2**64 - 1)
IOVEC_MAX = 1024
# Bytes read before they are checked: about what stays in a core's second-level cache.
READ_AHEAD_BYTES = 1 << 20
OPEN_FILES = 512


def row_dtype(row_bytes: int) -> np.dtype[np.void]:
    """Return the stored form of a row: its bytes and their crc32c."""
    return np.dtype([("data", np.uint8, (row_bytes,)), ("crc", "<u4")])


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
    """Writes one array's rows of one tar shard; nothing has the final name before `close`.

    Raises:
        UserError: from every method, where the disk refuses; the message names the file.
    """

    def __init__(self, path: Path, array: ArrayLayout, *, capacity: int):
        self.path = path
        self.array = array
        self.capacity = capacity
        self.rows = 0
        self._crcs: list[npt.NDArray[np.uint32]] = []
        self._opened = ExitStack()
        self._file = self._opened.enter_context(open_atomic(path, temporary=partial_path(path)))

    def append(self, rows: Bytes) -> None:
        """Write the next rows, uint8 [m, row_bytes]."""
        assert rows.shape[1] == self.array.row_bytes and self.rows + len(rows) <= self.capacity
        stored = np.empty(len(rows), row_dtype(self.array.row_bytes))
        stored["data"], stored["crc"] = rows, crc32c_rows(rows)
        self._put(stored)
        self._crcs.append(stored["crc"].copy())
        self.rows += len(rows)

    def append_whole(self, rows: Bytes) -> None:
        """Write all rows of an array whose chunk is the tar shard; rows short of the capacity are zeros."""
        stored = np.zeros(1, row_dtype(self.capacity * self.array.row_bytes))
        stored["data"][0, : rows.size] = rows.reshape(-1)
        stored["crc"] = crc32c(stored["data"])
        self._put(stored)
        self._crcs.append(stored["crc"].copy())
        self.rows = len(rows)

    def close(self) -> FileRecord:
        """Write the index, make the file durable and name it."""
        if self.array.per_row:
            self._put(index_bytes(self.array, rows=self.rows, capacity=self.capacity))
        self._opened.close()
        crcs = np.concatenate([np.empty(0, "<u4"), *self._crcs])
        size = self.array.file_bytes(self.rows, self.capacity)
        return FileRecord(size, hashlib.sha256(crcs.tobytes()).hexdigest(), int(crcs[0]) if len(crcs) else 0)

    def abort(self) -> None:
        """Remove what was written; does nothing after `close`."""
        # No Exception: that would be looked at for what the disk had against it.
        self._opened.pop_all().__exit__(GeneratorExit, GeneratorExit(), None)

    def _put(self, stored: npt.NDArray[np.generic]) -> None:
        try:
            self._file.write(stored)
        except BaseException as error:
            # Through the atomic writer, which removes the file and says what the disk refused.
            self._opened.pop_all().__exit__(type(error), error, error.__traceback__)
            raise


class ShardFile:
    """An open shard file whose size, index and first row have been checked against its commit record.

    Reading uses preadv, which has no file position, so threads share it; the descriptor is closed when the
    last holder lets go of it.
    """

    def __init__(self, path: Path, array: ArrayLayout, *, rows: int, capacity: int, record: FileRecord):
        self.path = path
        self.array = array
        self.rows = rows
        self.record = record
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise CacheCorrupt(f"{path}: missing, though its shard was committed. {REPAIR}") from error
        size = os.fstat(self._fd).st_size
        _check_size(path, size, array.file_bytes(rows, capacity), record)
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

    def read(
        self, rows: npt.NDArray[np.int64], out: Bytes, slots: npt.NDArray[np.int64], *, check: bool
    ) -> npt.NDArray[np.uint32]:
        """Read `rows` into `out[slots]`.

        Args:
            rows: places in the shard, ascending is fastest, int64 [m].
            out: uint8 [slots, row_bytes].
            slots: int64 [m].
            check: verify each row's crc32c.

        Returns:
            The stored crc32c of each row, uint32 [m].

        Raises:
            CacheCorrupt: a row fails its checksum, or the file ends before it; names row and file.
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
        return words.view("<u4")[:, 0]

    def _check(self, rows: npt.NDArray[np.int64], out: Bytes, slots: npt.NDArray[np.int64], words: Bytes) -> None:
        stored, found = words.view("<u4")[:, 0], crc32c_rows(out, slots)
        if not np.array_equal(stored, found):
            i = int(np.flatnonzero(stored != found)[0])
            raise CacheCorrupt(
                f"{self.path}: row {rows[i]} has crc32c {found[i]:08x}, its stored checksum is {stored[i]:08x}. The "
                f"bytes changed on disk. {REPAIR}"
            )

    def check_content(self) -> None:
        """Read and check every row, and then all checksums against the commit record."""
        row, digest = np.empty((1, self.array.row_bytes), np.uint8), hashlib.sha256()
        for place in range(self.rows):
            digest.update(self.read(np.array([place]), row, np.zeros(1, np.int64), check=True).tobytes())
        if digest.hexdigest() != self.record.sha256:
            raise CacheCorrupt(
                f"{self.path}: its checksums have sha256 {digest.hexdigest()[:16]}, {self.record.sha256[:16]} was "
                f"committed, though each row fits its own checksum: rows of another shard or another build. {REPAIR}"
            )


class ViewSetFiles:
    """The shard files of one view set, at most `limit` of them open.

    Attributes:
        commits: by shard; only these shards can be read.
    """

    def __init__(
        self, paths: Paths, view_set: int, spec: CacheSpec, commits: Mapping[int, Commit], *, limit: int | None = None
    ):
        self.commits = commits
        self._paths, self._view_set, self._spec = paths, view_set, spec
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # A file that is evicted while a thread reads it lives until that thread lets go of it.
        self.open = functools.lru_cache(limit or max(4, min(OPEN_FILES, soft // 4)))(self._open)

    def _open(self, array: ArrayLayout, shard: int) -> ShardFile:
        path, commit = self._paths.chunk(self._view_set, array, shard), self.commits[shard]
        return ShardFile(
            path, array, rows=commit.rows, capacity=self._spec.capacity, record=commit.files[array.name]
        )

    def check_sizes(self) -> None:
        """Raise CacheCorrupt where a committed file is missing or has another size."""
        for commit in self.commits.values():
            for array in self._spec.arrays():
                path = self._paths.chunk(self._view_set, array, commit.shard)
                try:
                    size = path.stat().st_size
                except FileNotFoundError as error:
                    raise CacheCorrupt(f"{path}: missing, though its shard was committed. {REPAIR}") from error
                _check_size(path, size, array.file_bytes(commit.rows, self._spec.capacity), commit.files[array.name])

    def read_whole(self, array: ArrayLayout, shard: int) -> Bytes:
        """Read and check an array whose chunk is the tar shard; uint8 [rows, row_bytes]."""
        path, commit = self._paths.chunk(self._view_set, array, shard), self.commits[shard]
        record = commit.files[array.name]
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise CacheCorrupt(f"{path}: missing, though its shard was committed. {REPAIR}") from error
        _check_size(path, len(data), array.file_bytes(commit.rows, self._spec.capacity), record)
        found = crc32c(data[:-CRC_BYTES])
        if found != int.from_bytes(data[-CRC_BYTES:], "little") or found != record.head:
            raise CacheCorrupt(f"{path}: crc32c {found:08x}, {record.head:08x} was committed. {REPAIR}")
        return np.frombuffer(data, np.uint8, commit.rows * array.row_bytes).reshape(commit.rows, array.row_bytes)


def _check_size(path: Path, size: int, expected: int, record: FileRecord) -> None:
    if size != record.bytes or size != expected:
        raise CacheCorrupt(f"{path}: {size} bytes, {record.bytes} were committed. {REPAIR}")


@functools.cache
def _library() -> Callable[[int, int, int], int] | None:
    """Return `crc32c_extend` of the C library that google_crc32c's wheel ships, or None.

    The Python binding holds the interpreter lock while it computes and takes read-only memory alone; a
    foreign call does neither, so reader threads overlap. Without the bundled library the binding is used.
    """
    folder = Path(google_crc32c.__file__).resolve().parent
    candidates = [*folder.parent.glob("google_crc32c.libs/libcrc32c*"), *folder.glob(".dylibs/libcrc32c*")]
    for candidate in sorted(candidates):
        try:
            extend = ctypes.CDLL(str(candidate)).crc32c_extend
        except (OSError, AttributeError):
            continue
        extend.argtypes = [ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t]
        extend.restype = ctypes.c_uint32
        if extend(0, ctypes.c_char_p(b"123456789"), 9) == 0xE3069283:  # the published check value
            return extend
    return None


def crc32c(data: bytes | bytearray | memoryview | npt.NDArray[np.generic], initial: int = 0) -> int:
    """Return the CRC-32C of contiguous `data`, continuing from `initial`."""
    octets = np.frombuffer(data, dtype=np.uint8)
    extend = _library()
    if extend is None:
        return int(google_crc32c.extend(initial, octets.tobytes()))
    return extend(initial, octets.ctypes.data, octets.size)


def crc32c_rows(rows: npt.NDArray[np.uint8], chosen: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.uint32]:
    """Return the CRC-32C of each row, or of the chosen ones.

    Args:
        rows: uint8 [m, bytes]; each row contiguous.
        chosen: int64 [k]; None for all.

    Returns:
        uint32 [m] or [k].
    """
    assert rows.ndim == 2 and rows.dtype == np.uint8 and (rows.shape[1] <= 1 or rows.strides[1] == 1)
    places = range(len(rows)) if chosen is None else chosen.tolist()
    extend = _library()
    if extend is None:
        return np.array([crc32c(rows[place]) for place in places], dtype=np.uint32)
    start, stride, length = rows.ctypes.data, rows.strides[0], rows.shape[1]
    return np.array([extend(0, start + place * stride, length) for place in places], dtype=np.uint32)
