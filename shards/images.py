"""Read an image's bytes from where the listing found it, and notice that the source changed meanwhile."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from shards.sources.base import Container, SourceItem


class SourceUnreadable(UserError):
    """A file of the source that cannot be read."""


class ImageReader:
    """Reads items of a source; keeps each tar open."""

    def __init__(self, containers: Sequence[Container]) -> None:
        """Open nothing yet."""
        self._containers = containers
        self._descriptors: dict[int, int] = {}

    def read(self, item: SourceItem) -> bytes:
        """Return the bytes of an item.

        Raises:
            SourceUnreadable: the file cannot be opened or read.
            UserError: the file's size or mtime is not what the listing saw.
        """
        container = self._containers[item.container]
        path = Path(container.path, item.path) if container.is_folder else Path(container.path)
        try:
            if container.is_folder:
                data, status = _read_file(path)
            else:
                data = os.pread(self._descriptor(item.container), item.size, item.offset)
        except OSError as error:
            raise SourceUnreadable(
                f"{path}: cannot be read ({error.strerror}). Make it readable and run the same command "
                "again, or add --skip-unreadable to leave such files out."
            ) from error
        if container.is_folder and (status.st_size, status.st_mtime_ns) != (item.size, item.mtime_ns):
            raise _changed(path, item.size, status.st_size)
        if len(data) != item.size:
            raise _changed(path, item.size, len(data))
        return data

    def check_unchanged(self) -> None:
        """Check that the tars read from still have the size and mtime that the listing saw.

        Raises:
            UserError: one of them changed.
        """
        for number in self._descriptors:
            container = self._containers[number]
            status = Path(container.path).stat()
            if (status.st_size, status.st_mtime_ns) != (container.size, container.mtime_ns):
                raise _changed(Path(container.path), container.size, status.st_size)

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the tars."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _descriptor(self, number: int) -> int:
        if number not in self._descriptors:
            self._descriptors[number] = os.open(self._containers[number].path, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[number]


def _read_file(path: Path) -> tuple[bytes, os.stat_result]:
    with path.open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        return file.readall(), status


def _changed(path: Path, before: int, now: int) -> UserError:
    return UserError(
        f"{path}: changed while it was packed ({before} bytes when listed, {now} now, or another mtime). "
        "Keep the source still: delete the output folder and pack again."
    )
