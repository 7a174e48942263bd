"""A packed folder, read by row: through manifest and index only, with each JPEG's checksum compared."""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from common.errors import UserError
from shards.manifest import BLOCK, load_index, load_manifest

_MAX_OPEN_SHARDS = 512  # most systems allow 1024 open files a process


class ShardFolder:
    """Random access to the rows of a shard folder.

    Rows are copied by `pread`: where a disk fails or a tar is cut meanwhile, a mapped file would end the process,
    and its first touch of a page holds the interpreter while the disk reads. The size of every shard is checked when
    the folder is opened, each JPEG's crc32c when it is first read. Not thread-safe: one reader a thread.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a folder with manifest, index and tars; UserError where a file is missing or was changed."""
        self.path = Path(path)
        self.manifest = load_manifest(self.path)
        self.index = load_index(self.path)
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, the one used last at the end
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_open = max(8, min(_MAX_OPEN_SHARDS, soft // 2))
        self._checked = np.zeros(len(self.index), bool)

    def __len__(self) -> int:
        return len(self.index)

    def __enter__(self) -> ShardFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards; the next read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def sizes(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return height and width of rows, int64 [n, 2]."""
        return np.stack([self.index.height[rows], self.index.width[rows]], -1).astype(np.int64)

    def jpegs(self, rows: Iterable[int]) -> list[npt.NDArray[np.uint8]]:
        """Return encoded images, read-only uint8 [bytes] each; raises as `jpeg`."""
        return [np.frombuffer(self.jpeg(int(row)), np.uint8) for row in rows]

    def jpeg(self, row: int) -> bytes:
        """Return the encoded image of one row.

        Raises:
            UserError: the bytes are not those that were packed, or cannot be read.
        """
        data = self.read(row, int(self.index.offset[row]), int(self.index.size[row]))
        if not self._checked[row]:
            found, packed = google_crc32c.value(data), int(self.index.crc32c[row])
            if found != packed:
                raise UserError(
                    f"{self.describe(row)}: the JPEG's crc32c is {found:08x}, the index says {packed:08x}. The shard "
                    "was changed or damaged since packing. Run `make verify-shards` and pack it again."
                )
            self._checked[row] = True
        return data

    def key(self, row: int) -> str:
        """Return the sample's key, from the tar header before its JPEG."""
        header = self.read(row, int(self.index.offset[row]) - BLOCK, BLOCK)
        return header[:100].partition(b"\0")[0].decode("ascii", "replace").removesuffix(".jpg")

    def describe(self, row: int) -> str:
        """Name a row for an error: its shard, row and key."""
        return f"{self._shard_path(row)}: row {row} (key {self.key(row)})"

    def advise(self, rows: npt.NDArray[np.int64]) -> None:
        """Ask the kernel to bring rows into the page cache soon; returns at once, and never fails."""
        if not hasattr(os, "posix_fadvise") or not len(rows):
            return
        index, ends = self.index, np.flatnonzero((np.diff(rows) != 1) | (np.diff(self.index.shard[rows]) != 0)) + 1
        for run in np.split(rows, ends):  # neighbours in one shard
            first, last = int(run[0]), int(run[-1])
            size = int(index.offset[last]) + int(index.size[last]) - int(index.offset[first])
            try:
                descriptor = self._descriptor(first)
                os.posix_fadvise(descriptor, int(index.offset[first]), size, os.POSIX_FADV_WILLNEED)
            except (OSError, UserError):
                return  # advice only: the read that follows says what is wrong

    def read(self, row: int, offset: int, size: int) -> bytes:
        """Return bytes of the tar that holds a row; UserError where there are fewer, or none can be read."""
        try:
            data = os.pread(self._descriptor(row), size, offset)
        except OSError as error:
            raise UserError(
                f"{self._shard_path(row)}: {size} bytes at offset {offset} cannot be read ({error.strerror}). "
                "Check the disk or the mount, and resume."
            ) from error
        if len(data) != size:
            raise UserError(
                f"{self._shard_path(row)}: {len(data)} bytes at offset {offset}, the index says {size}. The "
                "tar was cut short. Run `make shards` again to rebuild it."
            )
        return data

    def _shard_path(self, row: int) -> Path:
        return self.path / self.manifest.shards[int(self.index.shard[row])].name

    def _descriptor(self, row: int) -> int:
        shard = int(self.index.shard[row])
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path, expected = self._shard_path(row), self.manifest.shards[shard].bytes
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be opened any more ({error.strerror}). Was it moved, or did its mount go away? "
                "Bring it back and resume."
            ) from error
        size = os.fstat(descriptor).st_size
        if size != expected:
            os.close(descriptor)
            raise UserError(
                f"{path}: {size} bytes, the manifest says {expected}. The shard was changed since packing. "
                "Run `make shards` again to rebuild it."
            )
        if len(self._open) >= self._max_open:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = descriptor
        return descriptor
