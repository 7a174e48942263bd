"""Images that are files of their own: class folders, or one folder without classes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from shards.format import UNKNOWN_LABEL
from shards.sources.base import Container, Source, SourceItem, class_labels, is_image_name, pass_over
from shards.sources.labels import LabelList

SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


def class_folders(root: Path, classes: tuple[str, ...] | None) -> Source:
    """Take `root/CLASS/**/IMAGE`: each folder directly in `root` is a class, empty ones too."""
    found = [entry.name for entry in _folders(root)]
    splits = sorted(name for name in found if name.lower() in SPLIT_NAMES)
    if splits and set(found) <= {*splits, "devkit"}:
        raise UserError(
            f"{root}: holds the folders {', '.join(splits)}, which are splits, not classes. "
            f"Pack each one for itself: {root / splits[0]}."
        )
    names = class_labels(found, classes, str(root))
    label_of = {name: label for label, name in enumerate(names)}
    ignored: dict[str, int] = {}

    def items() -> Iterator[SourceItem]:
        ignored.clear()
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
            if entry.is_dir() and not entry.name.startswith("."):
                yield from _walk(entry.path, entry.name + "/", label_of[entry.name], ignored)
            elif is_image_name(entry.name):
                beside = "images beside the class folders"
                ignored[beside] = ignored.get(beside, 0) + 1
            else:
                pass_over(ignored, entry.name)

    kind = f"class folders ({len(names)} classes)"
    return Source(kind, names, (Container(str(root.resolve()), 0, 0),), items, ignored)


def flat_folder(root: Path, labels: LabelList | None) -> Source:
    """Take the images below `root`, labelled by file name, or unlabelled where `labels` is None."""
    ignored: dict[str, int] = {}

    def items() -> Iterator[SourceItem]:
        ignored.clear()
        for item in _walk(str(root), "", UNKNOWN_LABEL, ignored):
            yield item if labels is None else labelled(item, labels, root)

    names = labels.class_names if labels else ()
    folder = Container(str(root.resolve()), 0, 0)
    return Source(f"a folder of images, {labels_in_words(labels)}", names, (folder,), items, ignored)


def labels_in_words(labels: LabelList | None) -> str:
    """Say where labels come from."""
    return f"{len(labels.label_of)} labels from a list" if labels else "unlabelled (label -1)"


def labelled(item: SourceItem, labels: LabelList, where: Path) -> SourceItem:
    """Give an item its label by file name and the name that it would have in class folders.

    Raises:
        UserError: the list has no entry for the file.
    """
    base = item.name.rpartition("/")[2]
    label = labels.label_of.get(base)
    if label is None:
        raise UserError(
            f"{where}: {base} has no entry in the list of labels ({len(labels.label_of)} entries). "
            "Pass the list that belongs to these images, or `--labels none` to pack without labels."
        )
    return item._replace(name=f"{labels.class_names[label]}/{base}", label=label)


def has_images_in_folders(root: Path) -> bool:
    """Tell whether some folder directly in `root` holds an image, at any depth."""
    below = (files for entry in _folders(root) for _, _, files in os.walk(entry.path))
    return any(is_image_name(file) for files in below for file in files)


def _folders(root: Path) -> list[os.DirEntry[str]]:
    return [entry for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")]


def _walk(
    folder: str, prefix: str, label: int, ignored: dict[str, int], depth: int = 0
) -> Iterator[SourceItem]:
    if depth > 32:
        raise UserError(f"{folder}: folders nested deeper than 32. A link that leads back? Remove it.")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = prefix + entry.name
        if entry.is_dir():
            if not entry.name.startswith("."):
                yield from _walk(entry.path, name + "/", label, ignored, depth + 1)
        elif is_image_name(entry.name):
            try:
                status = entry.stat()
                size, mtime = status.st_size, status.st_mtime_ns
            except OSError:  # a dangling link: the packer meets it again, and says so
                size, mtime = 0, 0
            yield SourceItem(name, name, 0, 0, size, mtime, label)
        else:
            pass_over(ignored, entry.name)
