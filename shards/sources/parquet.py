"""Hugging Face parquet files: staged once as plain bytes, since single rows of parquet cannot be read."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import canonical_json, file_sha256, open_atomic, remove_temporaries, write_atomic
from shards.manifest import UNKNOWN_LABEL
from shards.sources.base import Container, Source, SourceItem, SourceOptions, file_container
from shards.sources.labels import MAX_CLASSES, final_classes
from shards.sources.tars import of_split, split_of_file

_BATCH_ROWS = 64


def parquet_source(files: Sequence[Path], options: SourceOptions, where: Path) -> Source:
    """Take parquet files with an image column (a struct with `bytes`, or binary) and a label column.

    The source stages its images as plain bytes, since a shuffled order reads rows one by one, and parquet
    gives them up only by the row group.

    Raises:
        UserError: pyarrow is not installed, a file is damaged, a column is missing, files do not belong together, or
            are of several splits and none is chosen.
    """
    images, label_column = options.image_column, options.label_column or "label"
    if options.labels == "folders":
        raise UserError(f"{where}: parquet files, whose labels are in a column. Leave out --labels folders.")
    about = {file: _about(file) for file in files}
    of_bytes = [file for file in files if "binary" in about[file].columns.get(images, "")]
    with_images = of_bytes or [file for file in files if images in about[file].columns]
    chosen = of_split(with_images, options.split, where)
    first = about[(chosen or files)[0]]
    has_labels = options.labels is None and (label_column in first.columns or options.label_column is not None)
    if not chosen:
        raise UserError(
            f"{files[0]}: no column {images!r}, but {list(first.columns)}. Name the images' column by --image-column."
        )
    if len(places := sorted({str(file.parent) for file in chosen})) > 1:
        raise UserError(f"{where}: parquet files of several sets: {', '.join(places[:4])}. Give one of these folders.")
    for file in files:
        if file.parent == chosen[0].parent and split_of_file(file.stem) == split_of_file(chosen[0].stem):
            _check_columns(file, about[file], images, label_column if has_labels else "", first, chosen[0])
    filled = [file for file in chosen if about[file].rows]
    if not filled:
        raise UserError(f"{where}: {len(chosen)} parquet files without a row. Get them again.")
    columns = [images, label_column] if has_labels else [images]
    containers = tuple(file_container(file) for file in filled)
    kind = f"{len(filled)} parquet files{'' if has_labels or options.labels else ', unlabelled (label -1)'}"
    left_out = [file.name for file in files if file not in filled]
    integers = [name for name, kind in first.columns.items() if _is_integer(kind) and name != images]
    notes = []
    if integers and not has_labels and options.labels is None:
        notes.append(f"Integers without a use: {', '.join(integers)}. --label-column takes one for the labels.")
    note = f"Of another split, without images or without rows, not packed: {', '.join(left_out[:9])} ({len(left_out)})."
    named = dict(enumerate(first.class_names(label_column) or ())) if has_labels else {}

    def stage(folder: Path, progress: bool) -> Source:
        """Write each parquet file's images one after another into a plain file; finished ones are kept."""
        folder.mkdir(exist_ok=True)
        remove_temporaries(folder)
        total = sum(container.size for container in containers)
        with tqdm(total=total, desc="staging", unit="B", unit_scale=True, disable=not progress) as bar:
            for number, container in enumerate(containers):
                if not _is_staged(folder, number, container, columns):
                    _stage_file(folder, number, container, columns)
                bar.update(container.size)
        return _staged(kind, folder, containers, named, options)

    return Source(kind, (), containers, _not_staged, stage=stage, notes=(*notes, note) if left_out else tuple(notes))


def _not_staged(_: Counter[str]) -> Iterator[SourceItem]:
    raise AssertionError("a parquet source is staged before it is listed")


def _staged(
    kind: str, folder: Path, containers: Sequence[Container], named: dict[int, str], options: SourceOptions
) -> Source:
    of_files = [_read_table(folder, number)[1] for number in range(len(containers))]
    extremes = min(map(min, of_files)), max(map(max, of_files))
    names, final = final_classes(named, extremes, options.classes, containers[0].path)

    def files(_: Counter[str]) -> Iterator[SourceItem]:
        for number, container in enumerate(containers):
            offset, stem = 0, Path(container.path).stem
            for row, (size, label, path) in enumerate(zip(*_read_table(folder, number), strict=True)):
                name = path or f"{stem}/{row:08d}"
                yield SourceItem(name, "", number, offset, size, 0, final(label))
                offset += size

    origins = tuple(
        replace(container, sha256=_staged_about(folder, number).get("sha256", ""))
        for number, container in enumerate(containers)
    )
    blobs = tuple(file_container(folder / f"{number:05d}.bin") for number in range(len(containers)))
    return Source(kind, names, blobs, files, origins=origins)


def _stage_file(folder: Path, number: int, container: Container, columns: list[str]) -> None:
    sizes: list[int] = []
    labels: list[int] = []
    paths: list[str] = []
    with _open(Path(container.path)) as parquet, open_atomic(folder / f"{number:05d}.bin") as blob:
        for batch in _batches(parquet, columns, container.path):
            images = batch.column(columns[0]).to_pylist()
            found = batch.column(columns[1]).to_pylist() if len(columns) == 2 else [None] * len(images)
            for image, label in zip(images, found, strict=True):
                where = f"{container.path}: row {len(sizes)}"
                data, path = _image_bytes(image, where)
                blob.write(data)
                label = UNKNOWN_LABEL if label is None else label
                if not UNKNOWN_LABEL <= label < MAX_CLASSES:
                    raise UserError(
                        f"{where} has the label {label}. Labels are 0 to {MAX_CLASSES - 1}, -1 where unknown."
                    )
                sizes.append(len(data))
                labels.append(label)
                paths.append(path)
        if sum(sizes) == 0:
            raise UserError(f"{container.path}: holds no image bytes. Check the file and --image-column.")
    about = {"size": container.size, "mtime_ns": container.mtime_ns, "columns": columns, "paths": paths}
    about["sha256"] = file_sha256(Path(container.path))  # now that it lies in memory
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


def _is_staged(folder: Path, number: int, container: Container, columns: list[str]) -> bool:
    if not (folder / f"{number:05d}.npz").exists():
        return False
    about = _staged_about(folder, number)
    if about.get("columns", columns) != columns:
        raise UserError(
            f"{container.path}: this packing began with the columns {about['columns']}, now they are {columns}. "
            "Give the same arguments, or delete the output folder to begin anew."
        )
    if (about["size"], about["mtime_ns"]) != (container.size, container.mtime_ns):
        raise UserError(
            f"{container.path}: changed since this packing began ({about['size']} bytes then, "
            f"{container.size} now, or another mtime). Restore it, or delete the output folder to begin anew."
        )
    return True


def _staged_about(folder: Path, number: int) -> dict[str, Any]:
    with np.load(folder / f"{number:05d}.npz") as archive:
        about: dict[str, Any] = json.loads(archive["about"].tobytes())
    return about


def _read_table(folder: Path, number: int) -> tuple[list[int], list[int], list[str]]:
    """Return sizes, labels and paths of a staged file's images."""
    with np.load(folder / f"{number:05d}.npz") as archive:
        paths = json.loads(archive["about"].tobytes())["paths"]
        return archive["sizes"].tolist(), archive["labels"].tolist(), paths


def count_images(files: Sequence[Path], image_column: str) -> int:
    """Return the rows of parquet files that hold images as bytes; 0 where pyarrow is not installed."""
    try:
        found = [_about(file) for file in files]
    except UserError:
        return 0
    return sum(about.rows for about in found if "binary" in about.columns.get(image_column, ""))


@dataclass(frozen=True)
class _About:
    """What the end of a parquet file says of it."""

    columns: dict[str, str]  # types by name
    metadata: dict[bytes, bytes]
    rows: int

    def class_names(self, column: str) -> list[str] | None:
        """Return the names that Hugging Face keeps of a ClassLabel column, None where there are none."""
        try:
            return list(json.loads(self.metadata[b"huggingface"])["info"]["features"][column]["names"])
        except (KeyError, TypeError, ValueError):
            return None


def _about(path: Path) -> _About:
    with _open(path) as file:
        schema = file.schema_arrow
        columns = {field.name: str(field.type) for field in schema}
        return _About(columns, schema.metadata or {}, file.metadata.num_rows)


def _check_columns(file: Path, about: _About, images: str, labels: str, first: _About, named: Path) -> None:
    """UserError where a file of a set lacks a column of the first one, or has other labels."""
    for column in filter(None, (images, labels)):
        if column not in about.columns:
            raise UserError(
                f"{file}: no column {column!r}, but {list(about.columns)}. Name it by --image-column or "
                "--label-column, or pass the file over by --ignore."
            )
    if labels and not _is_integer(about.columns[labels]):
        raise UserError(
            f"{file}: the labels in column {labels!r} are of type {about.columns[labels]}, not integers. Name the "
            "column of integer labels by --label-column, or pack without labels by `--labels none`."
        )
    now, before = about.class_names(labels), first.class_names(labels)
    if now != before:
        raise UserError(
            f"{file}: its classes are {str(now)[:60]}, those of {named.name} {str(before)[:60]}. Files of one set have "
            "the same: get them again, or pass one over by --ignore."
        )


def _is_integer(kind: str) -> bool:
    return re.fullmatch(r"u?int(8|16|32|64)", kind) is not None


def _batches(parquet: Any, columns: list[str], path: str) -> Iterator[Any]:
    """Yield batches of rows; UserError where a page is damaged."""
    import pyarrow

    batches = parquet.iter_batches(batch_size=_BATCH_ROWS, columns=columns)
    rows = 0
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: damaged after row {rows} ({reason}). Get the file again.") from error
        if batch is None:
            return
        yield batch
        rows += len(batch)


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
