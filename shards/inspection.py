"""Show what a shard folder holds: a summary, one sample, a contact sheet."""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from common.errors import UserError
from common.files import write_atomic
from shards.folder import ShardFolder
from shards.manifest import BLOCK, RowFlag, is_key, name_uid, padded

_CELL, _CAPTION = 160, 14  # pixels


def find_row(folder: ShardFolder, wanted: str) -> int:
    """Return the row of a number, an original relative name or a key; UserError where there is none."""
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


def describe_folder(folder: ShardFolder) -> str:
    """Return a summary: rows, classes, sizes, what was changed, what was left out."""
    manifest, index = folder.manifest, folder.index
    return "\n".join(
        (
            f"{folder.path}: {manifest.num_rows} rows, {manifest.num_classes} classes, "
            f"{len(manifest.shards)} shards of {manifest.rows_per_shard}, seed {manifest.seed}",
            f"source: {manifest.source['kind']}, {manifest.source['images']} images",
            f"images: {manifest.counts_text()}",
            f"JPEG: {_spread(index.size / 1000, 'kB')}",
            f"height: {_spread(index.height, 'px')}; width: {_spread(index.width, 'px')}",
            f"fingerprint: {manifest.fingerprint()}",
        )
    )


def _spread(values: npt.NDArray[Any], unit: str) -> str:
    low, middle, high = np.percentile(values, [0, 50, 100])
    return f"{low:.0f} to {high:.0f} {unit}, median {middle:.0f}"


def describe_row(folder: ShardFolder, row: int) -> str:
    """Return all that is known of one row."""
    index = folder.index
    flags = RowFlag(int(index.flags[row]))
    shard = folder.manifest.shards[int(index.shard[row])].name
    json_header = int(index.offset[row]) + padded(int(index.size[row]))
    member = tarfile.TarInfo.frombuf(folder.read(row, json_header, BLOCK), "utf-8", "strict")
    return "\n".join(
        (
            f"row {row}: {folder.key(row)}",
            f"description: {folder.read(row, json_header + BLOCK, member.size).decode()}",
            f"label: {index.label[row]} ({_class_name(folder, row, 'unknown')})",
            f"pixels: {index.width[row]} x {index.height[row]}",
            f"JPEG: {index.size[row]} bytes at {index.offset[row]} of {shard}, crc32c {index.crc32c[row]:08x}",
            f"id: {index.uid[row]:016x}",
            f"flags: {', '.join(str(flag.name).lower() for flag in flags) or 'none'}",
        )
    )


def _class_name(folder: ShardFolder, row: int, otherwise: str) -> str:
    label = int(folder.index.label[row])
    return folder.manifest.class_names[label] if label >= 0 else otherwise


def write_sheet(folder: ShardFolder, path: Path, rows: Sequence[int]) -> None:
    """Write a contact sheet of rows, each under its row number and class; the suffix gives the format."""
    columns = max(1, math.ceil(math.sqrt(len(rows))))
    height = math.ceil(len(rows) / columns) * (_CELL + _CAPTION)
    sheet = Image.new("RGB", (columns * _CELL, height), (24, 24, 24))
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        left, top = number % columns * _CELL, number // columns * (_CELL + _CAPTION)
        with Image.open(io.BytesIO(folder.jpeg(row))) as image:
            small = image.convert("RGB")
        small.thumbnail((_CELL - 4, _CELL - 4))
        sheet.paste(small, (left + (_CELL - small.width) // 2, top + (_CELL - small.height) // 2))
        caption = f"{row} {_class_name(folder, row, 'unlabelled')}".encode("ascii", "replace").decode()[:26]
        draw.text((left + 3, top + _CELL), caption, fill=(220, 220, 220))
    buffer = io.BytesIO()
    try:
        sheet.save(buffer, Image.registered_extensions()[path.suffix.lower()])
    except KeyError as error:
        raise UserError(f"{path}: no image format for {path.suffix!r}. End the name in .png or .jpg.") from error
    write_atomic(path, buffer.getvalue())
