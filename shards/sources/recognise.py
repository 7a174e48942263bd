"""Tell what kind of source a path is, and say so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shards.sources.base import Source
from shards.sources.folders import class_folders, flat_folder, has_images_in_folders


@dataclass(frozen=True)
class SourceOptions:
    """What the user tells about a source that it does not tell itself.

    Attributes:
        classes: classes in label order; None takes those that are found, sorted.
    """

    classes: tuple[str, ...] | None = None


def recognise(path: Path, options: SourceOptions) -> Source:
    """Return the source at a path, by what lies there."""
    if has_images_in_folders(path):
        return class_folders(path, options.classes)
    return flat_folder(path, None, ())
