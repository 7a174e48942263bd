"""Images that are files of their own: class folders, or one folder without classes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from common.errors import UserError
from shards.manifest import UNKNOWN_LABEL
from shards.sources.base import SPLIT_NAMES, Container, Source, SourceItem, by_folder, class_labels, is_image_name
from shards.sources.labels import Classes, LabelList


def class_folders(root: Path, classes: Classes) -> Source:
    """Take `root/CLASS/**/IMAGE`: each folder directly in `root` is a class, empty ones too."""
    found = [entry.name for entry in _folders(root)]
    splits = sorted(name for name in found if name.lower() in SPLIT_NAMES)
    if splits and set(found) <= {*splits, "devkit"}:
        raise UserError(
            f"{root}: holds the folders {', '.join(splits)}, which are splits, not classes. "
            f"Pack each one for itself: {root / splits[0]}."
        )
    label_of = class_labels(found, classes, root)
    kind = f"class folders ({len(label_of)} classes)"
    return Source(kind, tuple(label_of), (Container(str(root.resolve())),), lambda: _walk(root), by_folder(label_of))


def flat_folder(root: Path, labels: LabelList) -> Source:
    """Take the images below `root`, labelled by file name."""
    kind, by_name = f"a folder of images, {labels}", partial(labels.name_and_label, where=root)
    return Source(kind, labels.class_names, (Container(str(root.resolve())),), lambda: _walk(root), by_name)


def has_images_in_folders(root: Path) -> bool:
    """Tell whether some folder directly in `root` holds an image, at any depth."""
    below = (files for entry in _folders(root) for _, _, files in os.walk(entry.path))
    return any(is_image_name(file) for files in below for file in files)


def _folders(root: Path) -> list[os.DirEntry[str]]:
    return [entry for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")]


def _walk(folder: Path | str, prefix: str = "", depth: int = 0) -> Iterator[SourceItem]:
    if depth > 33:
        raise UserError(f"{folder}: folders nested deeper than 32. A link that leads back? Remove it.")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = prefix + entry.name
        if not entry.is_dir():
            try:
                status = entry.stat()
                size, mtime = status.st_size, status.st_mtime_ns
            except OSError:  # a dangling link: the packer meets it again, and says so
                size, mtime = 0, 0
            yield SourceItem(name, name, 0, 0, size, mtime, UNKNOWN_LABEL)
        elif not entry.name.startswith("."):
            yield from _walk(entry.path, name + "/", depth + 1)
