"""Hugging Face parquet files: staged once as plain bytes, since single rows of parquet cannot be read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import canonical_json, open_atomic, remove_temporaries, write_atomic
from shards.manifest import UNKNOWN_LABEL
from shards.sources.base import Container, Source, SourceItem, class_labels, file_container
from shards.sources.labels import Classes

_BATCH_ROWS = 64


def find_parquet(root: Path, split: str | None) -> list[Path]:
    """Return the parquet files of a split, here or in `data/`; UserError where it is not there, or one of several."""
    found = sorted(root.glob("*.parquet")) or sorted(root.glob("data/*.parquet"))
    files = [file for file in found if not file.name.startswith(".")]
    splits: dict[str, list[Path]] = {}
    for file in files:
        match = re.match(r"(.+?)-\d{5}-of-\d{5}.*\.parquet$", file.name)
        splits.setdefault(match[1] if match else "", []).append(file)
    if split is not None and files:
        if split not in splits:
            raise UserError(f"{root}: no split {split!r} among {sorted(splits)}. Give one of these by --split.")
        return splits[split]
    if len(splits) > 1:
        raise UserError(f"{root}: holds the splits {sorted(splits)}. Choose one by --split; pack each for itself.")
    return files


def parquet_source(files: Sequence[Path], classes: Classes, image_column: str, label_column: str) -> Source:
    """Take parquet files with an image column (a struct with `bytes`, or binary) and a label column.

    The source stages its images as plain bytes, since a shuffled order reads rows one by one, and parquet
    gives them up only by the row group.

    Raises:
        UserError: pyarrow is not installed, a file is damaged, or a column is missing.
    """
    with _open(files[0]) as first:
        schema = first.schema_arrow
    if image_column not in schema.names:
        raise UserError(
            f"{files[0]}: no column {image_column!r}, but {schema.names}. Name the images' column by --image-column."
        )
    has_labels = label_column in schema.names
    columns = [image_column, label_column] if has_labels else [image_column]
    label_type = str(schema.field(label_column).type) if has_labels else "int64"
    if not re.fullmatch(r"u?int(8|16|32|64)", label_type):
        raise UserError(
            f"{files[0]}: the labels in column {label_column!r} are of type {label_type}, not integers. Name the "
            "column of integer labels by --label-column, or one that is not there to pack without labels."
        )
    given = _class_names(schema.metadata or {}, label_column)
    containers = tuple(file_container(file) for file in files)
    kind = f"{len(files)} parquet files{'' if has_labels else ', unlabelled (label -1)'}"

    def stage(folder: Path, progress: bool) -> Source:
        """Write each parquet file's images one after another into a plain file; finished ones are kept."""
        folder.mkdir(exist_ok=True)
        remove_temporaries(folder)
        total = sum(container.size for container in containers)
        with tqdm(total=total, desc="staging", unit="B", unit_scale=True, disable=not progress) as bar:
            for number, container in enumerate(containers):
                if not _is_staged(folder, number, container):
                    _stage_file(folder, number, container, columns)
                bar.update(container.size)
        return _staged(kind, folder, containers, given, classes)

    return Source(kind, (), containers, _not_staged, stage=stage)


def _not_staged() -> Iterator[SourceItem]:
    raise AssertionError("a parquet source is staged before it is listed")


def _staged(kind: str, folder: Path, containers: Sequence[Container], given: Classes, classes: Classes) -> Source:
    largest = max(max(_read_table(folder, number)[1], default=-1) for number in range(len(containers)))
    names, relabel = _final_classes(given, classes, largest, containers[0].path)

    def files() -> Iterator[SourceItem]:
        for number, container in enumerate(containers):
            offset, stem = 0, Path(container.path).stem
            for row, (size, label, path) in enumerate(zip(*_read_table(folder, number), strict=True)):
                name = path or f"{stem}/{row:08d}"
                yield SourceItem(name, "", number, offset, size, 0, relabel[label] if label >= 0 else label)
                offset += size

    blobs = tuple(file_container(folder / f"{number:05d}.bin") for number in range(len(containers)))
    return Source(kind, names, blobs, files)


def _stage_file(folder: Path, number: int, container: Container, columns: list[str]) -> None:
    sizes: list[int] = []
    labels: list[int] = []
    paths: list[str] = []
    with _open(Path(container.path)) as parquet, open_atomic(folder / f"{number:05d}.bin") as blob:
        for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            images = batch.column(columns[0]).to_pylist()
            found = batch.column(columns[1]).to_pylist() if len(columns) == 2 else [None] * len(images)
            for image, label in zip(images, found, strict=True):
                where = f"{container.path}: row {len(sizes)}"
                data, path = _image_bytes(image, where)
                blob.write(data)
                label = UNKNOWN_LABEL if label is None else label
                if not UNKNOWN_LABEL <= label < 1 << 31:
                    raise UserError(f"{where} has the label {label}. Labels are 0 and up, -1 where unknown.")
                sizes.append(len(data))
                labels.append(label)
                paths.append(path)
        if sum(sizes) == 0:
            raise UserError(f"{container.path}: holds no image bytes. Check the file and --image-column.")
    about = {"size": container.size, "mtime_ns": container.mtime_ns, "paths": paths}
    arrays: dict[str, Any] = {
        "sizes": np.array(sizes, np.int64),
        "labels": np.array(labels, np.int32),
        "about": np.frombuffer(canonical_json(about), np.uint8),
    }
    write_atomic(folder / f"{number:05d}.npz", lambda file: np.savez(file, allow_pickle=False, **arrays))


def _image_bytes(image: Any, where: str) -> tuple[bytes, str]:
    """Return the bytes and the path of one cell; an absent image is empty bytes, which packing quarantines."""
    if isinstance(image, dict):
        return image.get("bytes") or b"", image.get("path") or ""
    if image is None or isinstance(image, bytes):
        return image or b"", ""
    raise UserError(
        f"{where} holds a {type(image).__name__} for an image, not bytes. "
        "Name the column of encoded images by --image-column."
    )


def _is_staged(folder: Path, number: int, container: Container) -> bool:
    table = folder / f"{number:05d}.npz"
    if not table.exists():
        return False
    with np.load(table) as archive:
        about = json.loads(archive["about"].tobytes())
    if (about["size"], about["mtime_ns"]) != (container.size, container.mtime_ns):
        raise UserError(
            f"{container.path}: changed since this packing began ({about['size']} bytes then, "
            f"{container.size} now, or another mtime). Restore it, or delete the output folder to begin anew."
        )
    return True


def _read_table(folder: Path, number: int) -> tuple[list[int], list[int], list[str]]:
    """Return sizes, labels and paths of a staged file's images."""
    with np.load(folder / f"{number:05d}.npz") as archive:
        paths = json.loads(archive["about"].tobytes())["paths"]
        return archive["sizes"].tolist(), archive["labels"].tolist(), paths


def _class_names(metadata: dict[bytes, bytes], label_column: str) -> Classes:
    """Return the names that Hugging Face keeps of a ClassLabel column, None where there are none."""
    try:
        return tuple(json.loads(metadata[b"huggingface"])["info"]["features"][label_column]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _final_classes(given: Classes, classes: Classes, largest: int, where: str) -> tuple[tuple[str, ...], list[int]]:
    """Return the classes in label order and the final label of each label in the files.

    Labels keep their order, as Hugging Face's ImageNet is in the order of sorted wnids already, unless the
    names are wnids out of order, or `classes` gives another order of the same names.
    """
    names = order = given or classes or tuple(str(label) for label in range(largest + 1))
    if given and (classes or all(re.fullmatch(r"n\d{8}", name) for name in given)):
        names = tuple(class_labels(given, classes, where))
    if largest >= len(order):
        raise UserError(f"{where}: label {largest}, but {len(order)} classes are named. Give --classes.")
    position = {name: label for label, name in enumerate(names)}
    return names, [position[name] for name in order]


def _open(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{path}: reading parquet needs pyarrow, which is not installed. `pip install pyarrow`."
        ) from error
    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error}). Get the file again.") from error
