"""What every kind of source gives the packer: containers on disk, a stream of items in them, and the items' bytes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from shards.sources.labels import Classes

IMAGE_SUFFIXES = set(".jpg .jpeg .jpe .jfif .png .gif .webp .bmp .tif .tiff .ppm .pgm .avif .jp2".split())
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


class SourceItem(NamedTuple):
    """One image of a source: a plain tuple, since a million of them stream by."""

    name: str  # original relative name, "/" between folders; for classes `class/file`, whatever holds it
    path: str  # below the container where that is a folder, else ""
    container: int  # position in the source's containers
    offset: int  # byte offset in the container; 0 in a folder
    size: int  # bytes
    mtime_ns: int  # of the file where the container is a folder, else 0
    label: int  # class, -1 where unknown


@dataclass(frozen=True)
class Container:
    """A folder of images or a file that holds many; size and mtime are 0 for a folder."""

    path: str
    size: int = 0
    mtime_ns: int = 0

    @property
    def is_folder(self) -> bool:
        """Whether items are files below `path`."""
        return self.size == 0


@dataclass(frozen=True)
class Source:
    """A source that was recognised."""

    kind: str  # what it was taken for, in words
    class_names: tuple[str, ...]  # in label order; empty for unlabelled images
    containers: tuple[Container, ...]  # where the bytes lie
    files: Callable[[], Iterator[SourceItem]]  # starts to stream all that lies there
    # Name and label of an image by its name among the files, None where it has none. Without it, files are images,
    # named and labelled.
    name_and_label: Callable[[str], tuple[str, int] | None] | None = None
    # For a source whose images cannot be read one by one: writes them into a folder, with a bar if asked, and returns
    # the source that can.
    stage: Callable[[Path, bool], Source] | None = None
    ignored: Counter[str] = field(default_factory=Counter)  # files passed over, by reason; filled while `items()` runs

    def items(self) -> Iterator[SourceItem]:
        """Start a new listing of the images."""
        self.ignored.clear()
        for item in self.files():
            base = item.name.rpartition("/")[2]
            if self.name_and_label is None:
                yield item
            elif not is_image_name(base):
                self.ignored["hidden files" if base.startswith(".") else f"*{Path(base).suffix or base}"] += 1
            elif found := self.name_and_label(item.name):
                yield item._replace(name=found[0], label=found[1])
            else:
                self.ignored["images beside the class folders"] += 1


def file_container(path: Path) -> Container:
    """Describe a file that holds many images."""
    status = path.stat()
    if status.st_size == 0:
        raise UserError(f"{path}: 0 bytes. The download or copy failed; get it again.")
    return Container(str(path.resolve()), status.st_size, status.st_mtime_ns)


def is_image_name(name: str) -> bool:
    """Tell whether a file name has an image's suffix and is not hidden."""
    base = name.rpartition("/")[2]
    stem, dot, suffix = base.rpartition(".")
    # macOS lays `._a.jpg` beside `a.jpg`.
    return stem != "" and not base.startswith(".") and dot + suffix.lower() in IMAGE_SUFFIXES


def by_folder(label_of: dict[str, int]) -> Callable[[str], tuple[str, int] | None]:
    """Name and label images by the first folder of their names."""

    def name_and_label(name: str) -> tuple[str, int] | None:
        folder, slash, _ = name.partition("/")
        return (name, label_of[folder]) if slash else None

    return name_and_label


def class_labels(found: Collection[str], classes: Classes, where: Path | str) -> dict[str, int]:
    """Return the label of each class, in label order: sorted, or as `classes` gives them; UserError if it lacks one."""
    names = sorted(set(found)) if classes is None else classes
    missing = sorted(set(found).difference(names))
    if missing:
        raise UserError(
            f"{where}: class {missing[0]!r} ({len(missing)} in all) is not among the {len(names)} of the "
            "class list. Pass the list that these images belong to, or leave it out."
        )
    return {name: label for label, name in enumerate(names)}


class SourceUnreadable(UserError):
    """A file of the source that cannot be read."""


class ImageReader:
    """Reads items of a source; keeps each tar open. Notices that the source changed since it was listed."""

    def __init__(self, containers: Sequence[Container]) -> None:
        self._containers = containers
        self._descriptors: dict[int, int] = {}

    def read(self, item: SourceItem) -> bytes:
        """Return the bytes of an item; SourceUnreadable, or UserError where it is not what the listing saw."""
        container = self._containers[item.container]
        path, mtime_ns = Path(container.path, item.path if container.is_folder else ""), item.mtime_ns
        try:
            if container.is_folder:
                with path.open("rb", buffering=0) as file:
                    mtime_ns = os.fstat(file.fileno()).st_mtime_ns
                    data = file.readall()
            else:
                data = os.pread(self._descriptor(item.container), item.size, item.offset)
        except OSError as error:
            raise SourceUnreadable(
                f"{path}: cannot be read ({error.strerror}). Make it readable and run the same command "
                "again, or add --skip-unreadable to leave such files out."
            ) from error
        if (len(data), mtime_ns) != (item.size, item.mtime_ns):
            raise _changed(path, item.size, len(data))
        return data

    def check_unchanged(self) -> None:
        """Check that the tars read from still have the size and mtime that the listing saw; else UserError."""
        for container in (self._containers[number] for number in self._descriptors):
            status = Path(container.path).stat()
            if (status.st_size, status.st_mtime_ns) != (container.size, container.mtime_ns):
                raise _changed(Path(container.path), container.size, status.st_size)

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *_: object) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self, number: int) -> int:
        if number not in self._descriptors:
            self._descriptors[number] = os.open(self._containers[number].path, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[number]


def _changed(path: Path, before: int, now: int) -> UserError:
    return UserError(
        f"{path}: changed while it was packed ({before} bytes when listed, {now} now, or another mtime). "
        "Keep the source still: delete the output folder and pack again."
    )
