"""What every kind of source gives the packer: containers on disk, a stream of items in them, and the items' bytes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from common.files import file_sha256
from shards.sources.labels import Classes, LabelList, is_image_name

# Folders that systems and viewers lay among images: nobody's class.
_SYSTEM_MARKS = ("@", "#", "$", "~", "__")
_SYSTEM_FOLDERS = {"lost+found", "system volume information", "thumbnails", "thumbs"}


def is_system_folder(name: str) -> bool:
    """Tell whether a folder is one that systems and viewers make by themselves."""
    return name.startswith((*_SYSTEM_MARKS, ".Trash", ".snapshot")) or name.lower() in _SYSTEM_FOLDERS


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
    sha256: str = ""  # where it is known

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
    # Starts to stream the images that lie there, and counts by reason the files and folders that it passes over.
    files: Callable[[Counter[str]], Iterator[SourceItem]]
    # For a source whose images cannot be read one by one: writes them into a folder, with a bar if asked, and returns
    # the source that can.
    stage: Callable[[Path, bool], Source] | None = None
    origins: tuple[Container, ...] = ()  # of a source that was staged: the files that it was staged from
    notes: tuple[str, ...] = ()  # what else was seen that the user should know before packing
    ignored: Counter[str] = field(default_factory=Counter)  # what was passed over, by reason; filled by `items()`

    def items(self) -> Iterator[SourceItem]:
        """Start a new listing of the images."""
        self.ignored.clear()
        return self.files(self.ignored)


@dataclass(frozen=True)
class SourceOptions:
    """What the user tells about a source that it does not tell itself."""

    # Path of a list of labels; "none" packs without labels; "folders" takes each folder for a class, whatever its
    # name. None goes by what lies there, and looks for a list beside validation images of ImageNet.
    labels: str | None = None
    classes: Classes = None  # in label order; None takes those that are found, sorted
    split: str | None = None  # of a source that holds several
    image_column: str = "image"  # of parquet files
    label_column: str | None = None  # of parquet files, label lists and samples; None takes `label` where it is there
    ignore: tuple[str, ...] = ()  # patterns of files and folders to pass over, by name, as a shell has them

    def passes_over(self, name: str, *, is_folder: bool = False) -> str:
        """Return why a file or folder of that name is not packed; empty where it is."""
        if any(fnmatchcase(name, pattern) for pattern in self.ignore):
            return f"{name}/" if is_folder else "files by --ignore"
        if name.startswith("."):
            return "hidden folders" if is_folder else "hidden files"
        if is_folder:
            return f"{name}/" if is_system_folder(name) and self.labels != "folders" else ""
        return "" if is_image_name(name) else f"*{Path(name).suffix or name}"

    def passes_over_path(self, name: str) -> str:
        """Return why a file is not packed, by its relative name."""
        *folders, base = name.split("/")
        of_folders = filter(None, (self.passes_over(folder, is_folder=True) for folder in folders))
        return next(of_folders, "") or self.passes_over(base)


def file_container(path: Path) -> Container:
    """Describe a file that holds many images."""
    status = path.stat()
    if status.st_size == 0:
        raise UserError(f"{path}: 0 bytes. The download or copy failed; get it again.")
    return Container(str(path.resolve()), status.st_size, status.st_mtime_ns)


def describe_files(containers: Sequence[Container]) -> list[dict[str, Any]]:
    """Return name, size, time and hash of the files that hold images; no path, which another machine lacks."""
    return [
        {"name": Path(file.path).name, "bytes": file.size, "mtime_ns": file.mtime_ns, "sha256": file.sha256}
        for file in containers
        if not file.is_folder
    ]


def confirmed_files(
    before: list[dict[str, Any]], now: list[dict[str, Any]], containers: Sequence[Container]
) -> list[dict[str, Any]]:
    """Return `now` where it stands for the same files as `before`, by time or else by hash; else `before`."""
    if len(before) != len(now):
        return before
    files = (file for file in containers if not file.is_folder)
    for old, new, file in zip(before, now, files, strict=True):
        same = all(old[field] == new[field] for field in ("name", "bytes", "mtime_ns"))
        if not same and not (old["sha256"] and old["sha256"] == file_sha256(Path(file.path))):
            return before
    return now


def relabelled(source: Source, labels: LabelList, where: Path) -> Source:
    """Return a source whose images are named and labelled by a list, whatever labels they had."""

    def files(ignored: Counter[str]) -> Iterator[SourceItem]:
        for item in source.files(ignored):
            name, label = labels.name_and_label(item.name, where)
            yield item._replace(name=name, label=label)

    stage = source.stage
    staged = (lambda folder, progress: relabelled(stage(folder, progress), labels, where)) if stage else None
    kind = f"{source.kind}, {labels}"
    return replace(source, kind=kind, class_names=labels.class_names, files=files, stage=staged)


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
