"""The kinds of source that can be packed, and how each is recognised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from shards.manifest import MANIFEST_NAME
from shards.sources.base import Source, is_image_name
from shards.sources.folders import class_folders, flat_folder, has_images_in_folders
from shards.sources.labels import FILES_BESIDE, UNLABELLED, Classes, LabelList, load_labels
from shards.sources.parquet import find_parquet, parquet_source
from shards.sources.tars import class_tar_files, first_member, flat_tar, tar_of_class_folders, tar_of_class_tars


@dataclass(frozen=True)
class SourceOptions:
    """What the user tells about a source that it does not tell itself."""

    # Path of a list of labels for images without class folders; "none" packs them unlabelled; None looks beside
    # validation images of ImageNet and otherwise packs unlabelled.
    labels: str | None = None
    classes: Classes = None  # in label order; None takes those that are found, sorted
    split: str | None = None  # of a folder of parquet files
    image_column: str = "image"  # of parquet files
    label_column: str = "label"  # of parquet files


def recognise(path: Path, options: SourceOptions) -> Source:
    """Return the source at a path, told apart by what lies there; UserError if it is none, or needs an option."""
    if path.is_file():
        return _recognise_file(path, options)
    if not path.is_dir():
        raise UserError(f"{path}: neither a file nor a folder. Give a folder of images, a tar or parquet files.")
    if (path / MANIFEST_NAME).exists():
        raise UserError(f"{path}: holds a {MANIFEST_NAME}: it is packed already. Give the images' folder.")
    parquet = find_parquet(path, options.split)
    if parquet:
        return parquet_source(parquet, options.classes, options.image_column, options.label_column)
    if has_images_in_folders(path):
        return class_folders(path, options.classes)
    tars = sorted(tar for tar in path.glob("*.tar") if not tar.name.startswith("."))
    downloads = [tar for tar in tars if tar.name.startswith("ILSVRC2012_img_")]
    if downloads:
        names = ", ".join(tar.name for tar in downloads)
        raise UserError(f"{path}: holds {names}. Give the tar itself: {downloads[0]}.")
    if tars:
        return class_tar_files(tars, options.classes)
    first = next((entry.name for entry in sorted(path.iterdir()) if is_image_name(entry.name)), "")
    return flat_folder(path, _labels_for(first, path, options))


def _recognise_file(path: Path, options: SourceOptions) -> Source:
    if path.suffix == ".parquet":
        return parquet_source([path], options.classes, options.image_column, options.label_column)
    if is_image_name(path.name):
        raise UserError(f"{path}: one image. Give the folder that it lies in: {path.parent}.")
    *folders, name = first_member(path)
    if name.endswith(".tar"):
        return tar_of_class_tars(path, options.classes)
    if folders:
        return tar_of_class_folders(path, options.classes)
    return flat_tar(path, _labels_for(name, path, options))


def _labels_for(first_image: str, path: Path, options: SourceOptions) -> LabelList:
    if options.labels == "none":
        return UNLABELLED
    if options.labels is not None:
        return load_labels(Path(options.labels), options.classes)
    if not first_image.startswith("ILSVRC2012_val_"):
        return UNLABELLED
    for folder in (path, path.parent) if path.is_dir() else (path.parent,):
        for name in FILES_BESIDE:
            if (folder / name).exists():
                return load_labels(folder / name, options.classes)
    raise UserError(
        f"{path}: validation images of ImageNet, and no list of their labels beside them (looked for "
        f"{', '.join(FILES_BESIDE)}). Give one by --labels, or `--labels none` to pack without labels."
    )
