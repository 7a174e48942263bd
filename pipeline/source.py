"""Encoded images by row, as views of the memory-mapped shards; reads through manifest and index only."""

from __future__ import annotations

import logging
import mmap
import os
import resource
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from common.errors import UserError
from shards.format import load_manifest
from shards.index import load_index

ACCESS = ("auto", "mmap", "pread")

_TAR_BLOCK = 512
_TAR_NAME_BYTES = 100
_JPEG_SUFFIX = ".jpg"
# Each mapping holds a file descriptor; most systems allow 1024 a process.
_MAX_OPEN_SHARDS = 512

_log = logging.getLogger("pipeline")


class ShardSource:
    """Random access to the rows of a shard folder.

    The size of every shard is checked when the folder is opened, each JPEG's crc32c when it is first read.
    Not thread-safe: one reader a thread.

    Attributes:
        folder: the shard folder.
        manifest: its manifest.
        index: its index.
    """

    def __init__(self, shards_dir: str | Path, *, access: str = "auto") -> None:
        """Open a shard folder.

        Args:
            shards_dir: folder with manifest, index and tars; a network mount will do.
            access: `mmap` (no copy), `pread` (a copy; reads never fault), or `auto`: mmap where the file
                system has it.

        Raises:
            UserError: a file is missing or was changed since packing, or `access` is unknown.
        """
        if access not in ACCESS:
            raise UserError(f"access: {access!r} is unknown. There are: {', '.join(ACCESS)}.")
        self.folder = Path(shards_dir)
        self.manifest = load_manifest(self.folder)
        self.index = load_index(self.folder)
        self._paths = [self.folder / shard.name for shard in self.manifest.shards]
        self._access = access
        self._open: OrderedDict[int, mmap.mmap | int] = OrderedDict()
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_open = max(8, min(_MAX_OPEN_SHARDS, soft // 2))
        self._checked = np.zeros(len(self.index), bool)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.index)

    def __enter__(self) -> ShardSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards; views given out before stay valid."""
        while self._open:
            self._drop(self._open.popitem()[1])

    def sizes(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Height and width of rows, int64 [n, 2]."""
        return np.stack([self.index.height[rows], self.index.width[rows]], -1).astype(np.int64)

    def jpegs(self, rows: Iterable[int]) -> list[npt.NDArray[np.uint8]]:
        """Encoded images, read-only uint8 [bytes] each.

        Raises:
            UserError: a row's bytes are not those that were packed.
        """
        return [self.jpeg(int(row)) for row in rows]

    def jpeg(self, row: int) -> npt.NDArray[np.uint8]:
        """The encoded image of one row, read-only uint8 [bytes].

        Raises:
            UserError: the bytes are not those that were packed.
        """
        offset, size = int(self.index.offset[row]), int(self.index.size[row])
        data = self._read(int(self.index.shard[row]), offset, size)
        if not self._checked[row]:
            self._check(row, data)
        return data

    def key(self, row: int) -> str:
        """The sample's key, from the tar header before its JPEG."""
        offset = int(self.index.offset[row]) - _TAR_BLOCK
        header = self._read(int(self.index.shard[row]), offset, _TAR_BLOCK)
        name = header[:_TAR_NAME_BYTES].tobytes().split(b"\0")[0].decode("ascii", "replace")
        return name.removesuffix(_JPEG_SUFFIX)

    def describe(self, row: int) -> str:
        """Name a row for an error: its shard, row and key."""
        return f"{self._paths[int(self.index.shard[row])]}: row {row} (key {self.key(row)})"

    def advise(self, rows: npt.NDArray[np.int64]) -> None:
        """Ask the kernel to bring rows into the page cache soon; returns at once, and never fails."""
        if not hasattr(os, "posix_fadvise"):
            return
        shards = self.index.shard[rows]
        for shard in np.unique(shards).tolist():
            try:
                descriptor = os.open(self._paths[shard], os.O_RDONLY)
            except OSError:
                continue  # the read that follows will say what is wrong
            try:
                for row in rows[shards == shard].tolist():
                    os.posix_fadvise(
                        descriptor,
                        int(self.index.offset[row]),
                        int(self.index.size[row]),
                        os.POSIX_FADV_WILLNEED,
                    )
            except OSError:
                pass  # advice only: some file systems do not take it
            finally:
                os.close(descriptor)

    def _check(self, row: int, data: npt.NDArray[np.uint8]) -> None:
        found, packed = google_crc32c.value(data.tobytes()), int(self.index.crc32c[row])
        if found != packed:
            raise UserError(
                f"{self.describe(row)}: the JPEG's crc32c is {found:08x}, the index says {packed:08x}. The shard "
                "was changed or damaged since packing. Run `make verify-shards` and pack it again."
            )
        self._checked[row] = True

    def _read(self, shard: int, offset: int, size: int) -> npt.NDArray[np.uint8]:
        handle = self._handle(shard)
        if isinstance(handle, int):
            try:
                data = os.pread(handle, size, offset)
            except OSError as error:
                raise UserError(
                    f"{self._paths[shard]}: {size} bytes at offset {offset} cannot be read ({error.strerror}). "
                    "Check the disk or the mount, and resume."
                ) from error
            if len(data) != size:
                raise UserError(
                    f"{self._paths[shard]}: {len(data)} bytes at offset {offset}, the index says {size}. The "
                    "tar was cut short. Run `make shards` again to rebuild it."
                )
            return np.frombuffer(data, np.uint8)
        return np.frombuffer(handle, np.uint8, count=size, offset=offset)

    def _handle(self, shard: int) -> mmap.mmap | int:
        handle = self._open.get(shard)
        if handle is None:
            if len(self._open) >= self._max_open:
                self._drop(self._open.popitem(last=False)[1])
            handle = self._open[shard] = self._open_shard(shard)
        else:
            self._open.move_to_end(shard)
        return handle

    def _open_shard(self, shard: int) -> mmap.mmap | int:
        path, expected = self._paths[shard], self.manifest.shards[shard].bytes
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be opened any more ({error.strerror}). Was it moved, or did its mount go away? "
                "Bring it back and resume."
            ) from error
        try:
            size = os.fstat(descriptor).st_size
            if size != expected:
                raise UserError(
                    f"{path}: {size} bytes, the manifest says {expected}. The shard was changed since packing. "
                    "Run `make shards` again to rebuild it."
                )
            if self._access != "pread":
                try:
                    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
                except OSError as error:
                    if self._access == "mmap":
                        raise UserError(
                            f"{path}: cannot be memory-mapped ({error}). Some network mounts cannot. "
                            "Choose access pread or auto."
                        ) from error
                    self._access = "pread"
                    _log.warning("%s cannot be memory-mapped (%s): reading by pread", path, error)
            kept, descriptor = descriptor, -1
            return kept
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    @staticmethod
    def _drop(handle: mmap.mmap | int) -> None:
        if isinstance(handle, int):
            os.close(handle)
        # A mapping is unmapped when the last view of it is gone; closing it here would invalidate them.
