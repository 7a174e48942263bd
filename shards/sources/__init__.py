"""The kinds of source that can be packed, and how each is recognised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from common.errors import UserError
from shards.manifest import MANIFEST_NAME
from shards.sources.base import Source, SourceOptions, relabelled
from shards.sources.folders import folder_source, survey_folder
from shards.sources.labels import UNLABELLED, is_image_name, load_labels
from shards.sources.parquet import count_images, parquet_source
from shards.sources.tars import of_split, tar_source

__all__ = ["SourceOptions", "recognise"]


def recognise(path: Path, options: SourceOptions) -> Source:
    """Return the source at a path, told apart by what lies there; UserError if it is none, or needs an option."""
    source = _recognise_file(path, options) if path.is_file() else _recognise_folder(path, options)
    if options.labels in (None, "folders"):
        return source
    if options.labels == "none":
        return relabelled(source, UNLABELLED, path)
    return relabelled(source, load_labels(Path(options.labels), options.classes, options.label_column), path)


def _recognise_folder(path: Path, options: SourceOptions) -> Source:
    if not path.is_dir():
        raise UserError(f"{path}: neither a file nor a folder. Give a folder of images, a tar or parquet files.")
    if (path / MANIFEST_NAME).exists():
        raise UserError(f"{path}: holds a {MANIFEST_NAME}: it is packed already. Give the images' folder.")
    tree = survey_folder(path, options)
    parquet = [path / name for name in tree.others if name.endswith(".parquet")]
    tars = [path / name for name in tree.others if name.endswith(".tar")]
    num_images = tree.images.total()
    rows = count_images(parquet, options.image_column) if parquet and num_images else 0
    if rows and num_images > rows // 20:
        raise UserError(
            f"{path}: {num_images} images, and parquet files of {rows} rows with images, such as {parquet[0].name}. "
            "`--ignore '*.parquet'` packs the images; give the folder of the parquet files to pack these."
        )
    if parquet and (rows or not num_images):
        return parquet_source(parquet, options, path)
    if tars and len(tars) >= num_images:
        return _recognise_tars(path, tars, options)
    return folder_source(path, tree, options)


def _recognise_tars(path: Path, tars: list[Path], options: SourceOptions) -> Source:
    downloads = [tar for tar in tars if tar.name.startswith("ILSVRC2012_img_")]
    if downloads and options.split is None:
        names = ", ".join(tar.name for tar in downloads)
        raise UserError(f"{path}: holds {names}. Give the tar itself: {downloads[0]}.")
    if len(tars) == 1 or options.labels == "folders":  # a split is looked for inside
        return tar_source(tars, options, path)
    return tar_source(of_split(tars, options.split, path), replace(options, split=None), path)


def _recognise_file(path: Path, options: SourceOptions) -> Source:
    if path.suffix == ".parquet":
        return parquet_source([path], options, path)
    if is_image_name(path.name):
        raise UserError(f"{path}: one image. Give the folder that it lies in: {path.parent}.")
    return tar_source([path], options, path)
