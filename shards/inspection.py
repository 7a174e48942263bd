"""Show what a shard folder holds: a summary, one sample, a contact sheet."""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from common.atomic import write_atomic
from common.errors import UserError
from shards.folder import ShardFolder
from shards.format import RowFlag, is_key, name_uid
from shards.tar_format import BLOCK, padded

_CELL, _CAPTION = 160, 14  # pixels


def find_row(folder: ShardFolder, wanted: str) -> int:
    """Return the row of a number, an original relative name or a key.

    Raises:
        UserError: there is no such row.
    """
    if wanted.isdecimal() and str(int(wanted)) == wanted:  # "0012" can only be a key or a name
        if int(wanted) < len(folder):
            return int(wanted)
        raise UserError(f"{folder.path}: row {wanted}, of {len(folder)} rows. Give one of 0 to {len(folder) - 1}.")
    by_name = np.flatnonzero(folder.index.uid == np.uint64(name_uid(wanted)))
    if len(by_name):
        return int(by_name[0])
    if is_key(wanted):
        for row in range(len(folder)):
            if folder.key(row) == wanted:
                return row
    raise UserError(
        f"{folder.path}: {wanted!r} is neither a key nor an original name among {len(folder)} rows. "
        "Give a row number, a key such as n01440764_10026, or a name such as n01440764/n01440764_10026.JPEG."
    )


def description(folder: ShardFolder, row: int) -> str:
    """Return the text of a row's `.json`."""
    header = int(folder.index.offset[row]) + padded(int(folder.index.size[row]))
    member = tarfile.TarInfo.frombuf(folder.read(row, header, BLOCK), "utf-8", "strict")
    return folder.read(row, header + BLOCK, member.size).decode()


def describe_folder(folder: ShardFolder) -> str:
    """Return a summary: rows, classes, sizes, what was changed, what was left out."""
    manifest, index = folder.manifest, folder.index
    lines = [
        f"{folder.path}: {manifest.num_rows} rows, {manifest.num_classes} classes, "
        f"{len(manifest.shards)} shards of {manifest.rows_per_shard}, seed {manifest.seed}",
        f"source: {manifest.source['kind']}, {manifest.source['images']} images",
        "images: " + ", ".join(f"{name} {count}" for name, count in manifest.counts.items()),
        f"JPEG: {_spread(index.size / 1000, 'kB')}",
        f"height: {_spread(index.height, 'px')}; width: {_spread(index.width, 'px')}",
        f"fingerprint: {manifest.fingerprint()}",
    ]
    return "\n".join(lines)


def _spread(values: npt.NDArray[Any], unit: str) -> str:
    low, middle, high = np.percentile(values, [0, 50, 100])
    return f"{low:.0f} to {high:.0f} {unit}, median {middle:.0f}"


def describe_row(folder: ShardFolder, row: int) -> str:
    """Return all that is known of one row."""
    index = folder.index
    flags = RowFlag(int(index.flags[row]))
    label = int(index.label[row])
    class_name = folder.manifest.class_names[label] if label >= 0 else "unknown"
    shard = folder.manifest.shards[int(index.shard[row])].name
    return "\n".join(
        [
            f"row {row}: {folder.key(row)}",
            f"description: {description(folder, row)}",
            f"label: {label} ({class_name})",
            f"pixels: {index.width[row]} x {index.height[row]}",
            f"JPEG: {index.size[row]} bytes at {index.offset[row]} of {shard}, crc32c {index.crc32c[row]:08x}",
            f"id: {index.uid[row]:016x}",
            f"flags: {', '.join(str(flag.name).lower() for flag in flags) or 'none'}",
        ]
    )


def write_image(folder: ShardFolder, row: int, path: Path) -> None:
    """Write a row's JPEG, byte for byte, to a file."""
    write_atomic(path, folder.jpeg(row))


def write_sheet(folder: ShardFolder, path: Path, rows: Sequence[int]) -> None:
    """Write a contact sheet of rows, each under its row number and class; the suffix gives the format."""
    columns = max(1, math.ceil(math.sqrt(len(rows))))
    height = math.ceil(len(rows) / columns) * (_CELL + _CAPTION)
    sheet = Image.new("RGB", (columns * _CELL, height), (24, 24, 24))
    draw = ImageDraw.Draw(sheet)
    for (left, top), row in zip(_cells(columns), rows, strict=False):
        with Image.open(io.BytesIO(folder.jpeg(row))) as image:
            small = image.convert("RGB")
        small.thumbnail((_CELL - 4, _CELL - 4))
        sheet.paste(small, (left + (_CELL - small.width) // 2, top + (_CELL - small.height) // 2))
        label = int(folder.index.label[row])
        class_name = folder.manifest.class_names[label] if label >= 0 else "unlabelled"
        caption = f"{row} {class_name}".encode("ascii", "replace").decode()[:26]
        draw.text((left + 3, top + _CELL), caption, fill=(220, 220, 220))
    buffer = io.BytesIO()
    try:
        sheet.save(buffer, Image.registered_extensions()[path.suffix.lower()])
    except KeyError as error:
        raise UserError(f"{path}: no image format for {path.suffix!r}. End the name in .png or .jpg.") from error
    write_atomic(path, buffer.getvalue())


def _cells(columns: int) -> Iterator[tuple[int, int]]:
    number = 0
    while True:
        yield number % columns * _CELL, number // columns * (_CELL + _CAPTION)
        number += 1
