"""What every kind of source gives the packer: containers on disk and a stream of items in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError

IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".avif", ".jp2"),
}


class SourceItem(NamedTuple):
    """One image of a source: a plain tuple, since a million of them stream by.

    Attributes:
        name: original relative name, "/" between folders; for classes `class/file`, whatever holds it.
        path: path below the container where that is a folder, else "".
        container: position in the source's containers.
        offset: byte offset in the container; 0 in a folder.
        size: bytes.
        mtime_ns: of the file where the container is a folder, else 0.
        label: class, -1 where unknown.
    """

    name: str
    path: str
    container: int
    offset: int
    size: int
    mtime_ns: int
    label: int


@dataclass(frozen=True)
class Container:
    """A folder of images or a file that holds many; size and mtime are 0 for a folder."""

    path: str
    size: int
    mtime_ns: int

    @property
    def is_folder(self) -> bool:
        """Whether items are files below `path`."""
        return self.size == 0


@dataclass(frozen=True)
class Source:
    """A source that was recognised.

    Attributes:
        kind: what it was taken for, in words.
        class_names: classes in label order; empty for unlabelled images.
        containers: where the bytes lie.
        items: starts a new listing.
        ignored: files passed over, by reason; filled while `items()` runs.
        stage: for a source whose images cannot be read one by one: writes them into a folder, with a bar if
            asked, and returns the source that can.
    """

    kind: str
    class_names: tuple[str, ...]
    containers: tuple[Container, ...]
    items: Callable[[], Iterator[SourceItem]]
    ignored: dict[str, int] = field(default_factory=dict)
    stage: Callable[[Path, bool], Source] | None = None


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


def pass_over(ignored: dict[str, int], name: str) -> None:
    """Count a file that is no image under its suffix, or among the hidden ones."""
    base = name.rpartition("/")[2]
    reason = "hidden files" if base.startswith(".") else f"*{Path(base).suffix or base}"
    ignored[reason] = ignored.get(reason, 0) + 1


def class_labels(found: list[str], classes: tuple[str, ...] | None, where: str) -> tuple[str, ...]:
    """Return the classes in label order: sorted, or as `classes` gives them, which must hold all found.

    Raises:
        UserError: a class was found that `classes` lacks.
    """
    if classes is None:
        return tuple(sorted(found))
    missing = sorted(set(found) - set(classes))
    if missing:
        raise UserError(
            f"{where}: class {missing[0]!r} ({len(missing)} in all) is not among the {len(classes)} of the "
            "class list. Pass the list that these images belong to, or leave it out."
        )
    return classes
