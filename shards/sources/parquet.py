"""Hugging Face parquet files: staged once as plain bytes, since single rows of parquet cannot be read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.atomic import open_atomic, remove_temporaries, write_atomic
from common.errors import UserError
from common.hashing import canonical_json
from shards.format import UNKNOWN_LABEL
from shards.sources.base import Container, Source, SourceItem, class_labels, file_container

_SPLIT = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}.*\.parquet$")
_WNID = re.compile(r"n\d{8}")
_INTEGER = re.compile(r"u?int(8|16|32|64)")
_BATCH_ROWS = 64


def find_parquet(root: Path, split: str | None) -> list[Path]:
    """Return the parquet files of a split in a folder or its `data/`, or the file; empty where there are none.

    Raises:
        UserError: several splits lie there and none was chosen, or the chosen one is not there.
    """
    if root.is_file():
        return [root]
    found = sorted(root.glob("*.parquet")) or sorted(root.glob("data/*.parquet"))
    files = [file for file in found if not file.name.startswith(".")]
    splits: dict[str, list[Path]] = {}
    for file in files:
        match = _SPLIT.match(file.name)
        splits.setdefault(match["split"] if match else "", []).append(file)
    if split is not None and files:
        if split not in splits:
            raise UserError(f"{root}: no split {split!r} among {sorted(splits)}. Give one of these by --split.")
        return splits[split]
    if len(splits) > 1:
        raise UserError(
            f"{root}: holds the splits {sorted(splits)}. Choose one by --split; pack each for itself."
        )
    return files


def parquet_source(
    files: Sequence[Path], classes: tuple[str, ...] | None, image_column: str, label_column: str
) -> Source:
    """Take parquet files with an image column (a struct with `bytes`, or binary) and a label column.

    The source stages its images as plain bytes, since a shuffled order reads rows one by one, and parquet
    gives them up only by the row group.

    Raises:
        UserError: pyarrow is not installed, a file is damaged, or a column is missing.
    """
    first = _open(files[0])
    columns = first.schema_arrow.names
    if image_column not in columns:
        raise UserError(
            f"{files[0]}: no column {image_column!r}, but {columns}. Name the images' column by --image-column."
        )
    has_labels = label_column in columns
    if has_labels:
        _check_label_type(first, files[0], label_column)
    given = _class_names(first.schema_arrow.metadata or {}, label_column)
    first.close()
    containers = tuple(file_container(file) for file in files)

    def stage(folder: Path, progress: bool) -> Source:
        label = label_column if has_labels else None
        return _stage(kind, containers, folder, _Columns(image_column, label), given, classes, progress)

    kind = f"{len(files)} parquet files{'' if has_labels else ', unlabelled (label -1)'}"
    return Source(kind, (), containers, _not_staged, stage=stage)


def _check_label_type(parquet: Any, file: Path, column: str) -> None:
    found = str(parquet.schema_arrow.field(column).type)
    if not _INTEGER.fullmatch(found):
        raise UserError(
            f"{file}: the labels in column {column!r} are of type {found}, not integers. Name the column of "
            "integer labels by --label-column, or one that is not there to pack without labels."
        )


class _Columns:
    def __init__(self, image: str, label: str | None) -> None:
        self.image, self.label = image, label
        self.names = [image] if label is None else [image, label]


def _not_staged() -> Iterator[SourceItem]:
    raise AssertionError("a parquet source is staged before it is listed")


def _stage(
    kind: str,
    containers: Sequence[Container],
    folder: Path,
    columns: _Columns,
    given: tuple[str, ...] | None,
    classes: tuple[str, ...] | None,
    progress: bool,
) -> Source:
    """Write each parquet file's images one after another into a plain file; finished ones are kept."""
    folder.mkdir(exist_ok=True)
    remove_temporaries(folder)
    total = sum(container.size for container in containers)
    with tqdm(total=total, desc="staging", unit="B", unit_scale=True, disable=not progress) as bar:
        for number, container in enumerate(containers):
            if not _is_staged(folder, number, container):
                _stage_file(folder, number, container, columns)
            bar.update(container.size)
    tables = [_read_table(folder, number) for number in range(len(containers))]
    largest = max((int(labels.max(initial=-1)) for _, labels, _ in tables), default=-1)
    names, relabel = _final_classes(given, classes, largest, containers[0].path)
    blobs = tuple(file_container(folder / f"{number:05d}.bin") for number in range(len(containers)))

    def items() -> Iterator[SourceItem]:
        for number, container in enumerate(containers):
            sizes, labels, paths = _read_table(folder, number)
            offset, stem = 0, Path(container.path).stem
            for row, (size, label, path) in enumerate(
                zip(sizes.tolist(), labels.tolist(), paths, strict=True)
            ):
                name = path or f"{stem}/{row:08d}"
                yield SourceItem(name, "", number, offset, size, 0, relabel[label] if label >= 0 else label)
                offset += size

    return Source(kind, names, blobs, items)


def _stage_file(folder: Path, number: int, container: Container, columns: _Columns) -> None:
    sizes: list[int] = []
    labels: list[int] = []
    paths: list[str] = []
    parquet = _open(Path(container.path))
    with parquet, open_atomic(folder / f"{number:05d}.bin") as blob:
        for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=columns.names):
            images = batch.column(columns.image).to_pylist()
            found = batch.column(columns.label).to_pylist() if columns.label else [UNKNOWN_LABEL] * len(images)
            for image, label in zip(images, found, strict=True):
                data, path = _image_bytes(image, container.path, len(sizes))
                blob.write(data)
                sizes.append(len(data))
                labels.append(UNKNOWN_LABEL if label is None else _label(label, container.path, len(labels)))
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


def _image_bytes(image: Any, file: str, row: int) -> tuple[bytes, str]:
    """Return the bytes and the path of one cell; an absent image is empty bytes, which packing quarantines."""
    if isinstance(image, dict):
        return image.get("bytes") or b"", image.get("path") or ""
    if image is None or isinstance(image, bytes):
        return image or b"", ""
    raise UserError(
        f"{file}: row {row} holds a {type(image).__name__} for an image, not bytes. "
        "Name the column of encoded images by --image-column."
    )


def _label(label: int, file: str, row: int) -> int:
    if not UNKNOWN_LABEL <= label < 1 << 31:
        raise UserError(f"{file}: row {row} has the label {label}. Labels are 0 and up, -1 where unknown.")
    return label


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


def _read_table(folder: Path, number: int) -> tuple[Any, Any, list[str]]:
    with np.load(folder / f"{number:05d}.npz") as archive:
        return archive["sizes"], archive["labels"], json.loads(archive["about"].tobytes())["paths"]


def _class_names(metadata: dict[bytes, bytes], label_column: str) -> tuple[str, ...] | None:
    """Return the names that Hugging Face keeps of a ClassLabel column, None where there are none."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return tuple(features[label_column]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _final_classes(
    given: tuple[str, ...] | None, classes: tuple[str, ...] | None, largest: int, where: str
) -> tuple[tuple[str, ...], list[int]]:
    """Return the classes in label order and the final label of each label in the files.

    Labels keep their order, as Hugging Face's ImageNet is in the order of sorted wnids already, unless the
    names are wnids out of order, or `classes` gives another order of the same names.
    """
    if given is None:
        names = classes or tuple(str(label) for label in range(largest + 1))
        order = names
    else:
        wnids = all(_WNID.fullmatch(name) for name in given)
        names = class_labels(list(given), classes, where) if classes or wnids else given
        order = given
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
