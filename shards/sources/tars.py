"""ImageNet's tars as downloaded, read in place by offset: nothing is unpacked to disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import UserError
from shards.format import UNKNOWN_LABEL
from shards.sources.base import Source, SourceItem, class_labels, file_container, is_image_name, pass_over
from shards.sources.folders import SPLIT_NAMES, labelled, labels_in_words
from shards.sources.labels import LabelList
from shards.tar_format import TarDamage, TarMember, walk_members

_COMPRESSED = {b"PK": "zip", b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_CUT = "The download or copy is incomplete or damaged: compare its checksum and get it again."


def first_member(path: Path) -> list[str]:
    """Return the name of a tar's first image or inner tar in parts, without a leading folder that names a split.

    Raises:
        UserError: the file is compressed, no tar, or holds neither.
    """
    with path.open("rb") as file:
        begin = file.read(2)
    if begin in _COMPRESSED:
        raise UserError(
            f"{path}: compressed with {_COMPRESSED[begin]}. Images are read by their place in the tar, so "
            "unpack it first and give the folder or the .tar that was in it."
        )
    for member in _walk(path, 0, path.stat().st_size):
        if is_image_name(member.name) or _is_tar_name(member.name):
            return _parts(member.name)
    raise UserError(f"{path}: a tar without images and without class tars. {_CUT}")


def tar_of_class_tars(path: Path, classes: tuple[str, ...] | None) -> Source:
    """Take a tar of tars, one a class, such as ILSVRC2012_img_train.tar."""
    outer = [member for member in _walk(path, 0, path.stat().st_size) if _is_tar_name(member.name)]
    names = class_labels([_stem(member.name) for member in outer], classes, str(path))
    label_of = {name: label for label, name in enumerate(names)}
    ignored: dict[str, int] = {}

    def items() -> Iterator[SourceItem]:
        ignored.clear()
        for member in outer:
            class_name = _stem(member.name)
            yield from _class_items(
                path, 0, member.offset, member.offset + member.size, class_name, label_of[class_name], ignored
            )

    kind = f"a tar of {len(outer)} class tars"
    return Source(kind, names, (file_container(path),), items, ignored)


def folder_of_class_tars(paths: list[Path], classes: tuple[str, ...] | None) -> Source:
    """Take class tars that lie side by side, as the outer tar unpacks to."""
    names = class_labels([path.stem for path in paths], classes, str(paths[0].parent))
    label_of = {name: label for label, name in enumerate(names)}
    containers = tuple(file_container(path) for path in paths)
    ignored: dict[str, int] = {}

    def items() -> Iterator[SourceItem]:
        ignored.clear()
        for number, path in enumerate(paths):
            end = containers[number].size
            yield from _class_items(path, number, 0, end, path.stem, label_of[path.stem], ignored)

    return Source(f"a folder of {len(paths)} class tars", names, containers, items, ignored)


def tar_of_class_folders(path: Path, classes: tuple[str, ...] | None) -> Source:
    """Take a tar whose members lie in class folders, below a folder named after a split or not."""
    size = path.stat().st_size
    found: set[str] = set()
    splits: set[str] = set()
    for member in _walk(path, 0, size):
        if is_image_name(member.name):
            split, parts = _split_and_parts(member.name)
            found.update(parts[:1] if len(parts) > 1 else ())
            splits.add(split)
    if len(splits) > 1:
        raise UserError(
            f"{path}: holds images of the folders {', '.join(sorted(splits))}, which are splits, not classes. "
            "Unpack it and pack each one for itself."
        )
    names = class_labels(sorted(found), classes, str(path))
    label_of = {name: label for label, name in enumerate(names)}

    def describe(member: TarMember) -> tuple[str, int] | None:
        parts = _parts(member.name)
        return ("/".join(parts), label_of[parts[0]]) if len(parts) > 1 else None

    return _one_tar(path, f"a tar of class folders ({len(names)} classes)", names, describe)


def flat_tar(path: Path, labels: LabelList | None) -> Source:
    """Take a tar of images, labelled by file name as in ILSVRC2012_img_val.tar, or unlabelled."""

    def describe(member: TarMember) -> tuple[str, int] | None:
        name = "/".join(_parts(member.name))
        if labels is None:
            return name, UNKNOWN_LABEL
        item = labelled(SourceItem(name, "", 0, 0, 0, 0, UNKNOWN_LABEL), labels, path)
        return item.name, item.label

    names = labels.class_names if labels else ()
    return _one_tar(path, f"a tar of images, {labels_in_words(labels)}", names, describe)


def _one_tar(
    path: Path,
    kind: str,
    names: tuple[str, ...],
    describe: Callable[[TarMember], tuple[str, int] | None],
) -> Source:
    ignored: dict[str, int] = {}

    def items() -> Iterator[SourceItem]:
        ignored.clear()
        for member in _walk(path, 0, path.stat().st_size):
            described = describe(member) if is_image_name(member.name) else None
            if described is None:
                pass_over(ignored, member.name)
            else:
                name, label = described
                yield SourceItem(name, "", 0, member.offset, member.size, 0, label)

    return Source(kind, names, (file_container(path),), items, ignored)


def _class_items(
    path: Path, container: int, start: int, end: int, class_name: str, label: int, ignored: dict[str, int]
) -> Iterator[SourceItem]:
    for member in _walk(path, start, end):
        base = member.name.rpartition("/")[2]
        if is_image_name(base):
            yield SourceItem(f"{class_name}/{base}", "", container, member.offset, member.size, 0, label)
        else:
            pass_over(ignored, base)


def _walk(path: Path, start: int, end: int) -> Iterator[TarMember]:
    try:
        with path.open("rb") as file:
            yield from walk_members(file, start=start, end=end)
    except TarDamage as damage:
        raise UserError(f"{path}: {damage} (it has {path.stat().st_size} bytes). {_CUT}") from damage


def _parts(name: str) -> list[str]:
    """Split a member's name, without a leading folder that names a split."""
    return _split_and_parts(name)[1]


def _split_and_parts(name: str) -> tuple[str, list[str]]:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return (parts[0], parts[1:]) if len(parts) > 1 and parts[0].lower() in SPLIT_NAMES else ("", parts)


def _is_tar_name(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.endswith(".tar") and not base.startswith(".")


def _stem(name: str) -> str:
    return re.sub(r"\.tar$", "", name.rpartition("/")[2])
