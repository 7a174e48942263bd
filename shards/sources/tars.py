"""ImageNet's tars as downloaded, read in place by offset: nothing is unpacked to disk."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from shards.manifest import BLOCK, UNKNOWN_LABEL
from shards.sources.base import SPLIT_NAMES, Source, SourceItem, by_folder, class_labels, file_container, is_image_name
from shards.sources.labels import Classes, LabelList

_COMPRESSED = {b"PK": "zip", b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_CUT = "The download or copy is incomplete or damaged: compare its checksum and get it again."


def first_member(path: Path) -> list[str]:
    """Return the name of a tar's first image or inner tar in parts, without a leading folder that names a split.

    UserError where the file is compressed, no tar, or holds neither.
    """
    with path.open("rb") as file:
        begin = file.read(2)
    if begin in _COMPRESSED:
        raise UserError(
            f"{path}: compressed with {_COMPRESSED[begin]}. Images are read by their place in the tar, so "
            "unpack it first and give the folder or the .tar that was in it."
        )
    for member in _walk(path):
        if is_image_name(member.name) or _is_tar_name(member.name):
            return _split_and_parts(member.name)[1]
    raise UserError(f"{path}: a tar without images and without class tars. {_CUT}")


def tar_of_class_tars(path: Path, classes: Classes) -> Source:
    """Take a tar of tars, one a class, such as ILSVRC2012_img_train.tar."""
    inner = [member for member in _walk(path) if _is_tar_name(member.name)]
    tars = [_ClassTar(Path(member.name).stem, 0, member.offset, member.offset + member.size) for member in inner]
    return _class_tars(f"a tar of {len(tars)} class tars", [path], tars, classes, path)


def class_tar_files(paths: list[Path], classes: Classes) -> Source:
    """Take class tars that lie side by side, as the outer tar unpacks to."""
    tars = [_ClassTar(path.stem, number, 0, None) for number, path in enumerate(paths)]
    return _class_tars(f"a folder of {len(paths)} class tars", paths, tars, classes, paths[0].parent)


class _ClassTar(NamedTuple):
    class_name: str
    container: int
    start: int  # bytes [start, end) of the container, to its end where `end` is None
    end: int | None


def _class_tars(kind: str, paths: list[Path], tars: Sequence[_ClassTar], classes: Classes, where: Path) -> Source:
    label_of = class_labels([tar.class_name for tar in tars], classes, where)

    def files() -> Iterator[SourceItem]:
        for class_name, container, start, end in tars:
            for member in _walk(paths[container], start, end):
                yield _item(f"{class_name}/{member.name.rpartition('/')[2]}", member, container)

    containers = tuple(file_container(path) for path in paths)
    return Source(kind, tuple(label_of), containers, files, by_folder(label_of))


def tar_of_class_folders(path: Path, classes: Classes) -> Source:
    """Take a tar whose members lie in class folders, below a folder named after a split or not."""
    found: set[str] = set()
    splits: set[str] = set()
    for member in _walk(path):
        if is_image_name(member.name):
            split, parts = _split_and_parts(member.name)
            found.update(parts[:1] if len(parts) > 1 else ())
            splits.add(split)
    if len(splits) > 1:
        raise UserError(
            f"{path}: holds images of the folders {', '.join(sorted(splits))}, which are splits, not classes. "
            "Unpack it and pack each one for itself."
        )
    label_of = class_labels(found, classes, path)
    kind = f"a tar of class folders ({len(label_of)} classes)"
    return Source(kind, tuple(label_of), (file_container(path),), lambda: _files(path), by_folder(label_of))


def flat_tar(path: Path, labels: LabelList) -> Source:
    """Take a tar of images, labelled by file name as in ILSVRC2012_img_val.tar."""
    kind, by_name = f"a tar of images, {labels}", partial(labels.name_and_label, where=path)
    return Source(kind, labels.class_names, (file_container(path),), lambda: _files(path), by_name)


def _files(path: Path) -> Iterator[SourceItem]:
    for member in _walk(path):
        yield _item("/".join(_split_and_parts(member.name)[1]), member, 0)


def _item(name: str, member: _Member, container: int) -> SourceItem:
    return SourceItem(name, "", container, member.offset, member.size, 0, UNKNOWN_LABEL)


class _Member(NamedTuple):
    name: str
    offset: int  # of its data, in the file
    size: int  # bytes


def _walk(path: Path, start: int = 0, end: int | None = None) -> Iterator[_Member]:
    """Yield the regular files of the tar that lies in bytes [start, end) of a file, reading headers alone.

    UserError where a header is damaged, a member passes the end, or the end-of-archive mark is missing.
    """

    def damaged(what: str) -> UserError:
        return UserError(f"{path}: {what} (it has {size} bytes). {_CUT}")

    size = path.stat().st_size
    end = size if end is None else end
    with path.open("rb") as file:
        file.seek(start)
        try:
            tar = tarfile.TarFile(fileobj=file, mode="r", encoding="utf-8", errors="surrogateescape")
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # or a million of them would be kept
                last = member.offset_data + member.size
                if last > end:
                    raise damaged(f"the member at byte {member.offset} ends at {last}, the tar at {end}: cut short")
                if member.isreg() and not member.issparse():
                    yield _Member(member.name, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise damaged(f"{error}: cut or damaged") from error
        # tarfile takes a damaged header for the end; the end is a block of zeros.
        file.seek(tar.offset)
        block = file.read(BLOCK)
    if len(block) < BLOCK or tar.offset + BLOCK > end:
        raise damaged(f"no end-of-archive mark at byte {tar.offset}: the tar was cut")
    if block.strip(b"\0"):
        raise damaged(f"the header at byte {tar.offset} does not match its checksum")


def _split_and_parts(name: str) -> tuple[str, list[str]]:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return (parts[0], parts[1:]) if len(parts) > 1 and parts[0].lower() in SPLIT_NAMES else ("", parts)


def _is_tar_name(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.endswith(".tar") and not base.startswith(".")
