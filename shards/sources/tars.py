"""Tars, read in place by offset, nothing unpacked to disk: ImageNet's as downloaded, trees, samples of WebDataset."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from shards.manifest import BLOCK, UNKNOWN_LABEL
from shards.sources.base import Source, SourceItem, SourceOptions, file_container
from shards.sources.folders import Tree, is_split_name, tree_source
from shards.sources.labels import IMAGE_SUFFIXES, class_labels, final_classes, is_image_name

_COMPRESSED = {b"PK": "zip", b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_CUT = "The download or copy is incomplete or damaged: compare its checksum and get it again."
_WNID = re.compile(r"n\d{8}")


def split_of_file(stem: str) -> str:
    """Return the split that a file of a set is named after (train-00000-of-00002, name-val-03, test); empty if none."""
    if match := re.match(r"(.+?)-\d{5}-of-\d{5}", stem):
        return match[1]
    return next((part for part in re.split(r"[-_.]", stem) if is_split_name(part)), "")


def of_split(files: Sequence[Path], split: str | None, where: Path) -> list[Path]:
    """Return the files of a split; UserError where it is not there, or several are and none is chosen."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        name = split_of_file(file.stem)
        parent = file.parent.name if is_split_name(file.parent.name) and file.parent != where else ""
        splits.setdefault(name or parent, []).append(file)
    if split is not None:
        if split not in splits:
            raise UserError(f"{where}: no split {split!r} among {sorted(splits)}. Give one of these by --split.")
        return splits[split]
    named = sorted(filter(None, splits))
    if len(named) > 1:
        raise UserError(f"{where}: holds the splits {named}. Choose one by --split; pack each for itself.")
    return list(files)


def tar_source(paths: Sequence[Path], options: SourceOptions, where: Path) -> Source:
    """Take tars: a tar of class tars or class tars side by side, trees of images, or samples with their labels.

    UserError where a file is compressed, cut or no tar, or what it holds is not clear.
    """
    first = _survey(paths[0], options)
    if first.holds_samples:
        return _samples_source(paths, options, where)
    tree, inner = first.tree, first.inner
    if len(paths) == 1 and inner and len(inner) >= tree.images.total():
        stems = [(Path(member.name).stem, 0, member.offset, member.offset + member.size) for member in inner]
        return _class_tars(
            f"a tar of {len(inner)} class tars", paths, [_ClassTar(*stem) for stem in stems], options, where
        )
    if len(paths) > 1 and len(tree.images) <= 1:
        tars = [_ClassTar(path.stem, number, 0, None) for number, path in enumerate(paths)]
        return _class_tars(f"a folder of {len(tars)} class tars", paths, tars, options, where)
    if not tree.images:
        raise UserError(f"{paths[0]}: a tar without images and without class tars. {_CUT}")
    for path in paths[1:]:
        tree = _survey(path, options, tree).tree
    containers = tuple(file_container(path) for path in paths)

    def files(prefix: str, ignored: Counter[str]) -> Iterator[SourceItem]:
        for number, path in enumerate(paths):
            for member in _walk(path):
                name = member.name.removeprefix(prefix)
                if why := options.passes_over_path(name):
                    ignored[why] += 1
                elif not member.name.startswith(prefix):
                    ignored["images of other folders"] += 1
                else:
                    yield _item(name, member, number)

    return tree_source("tar", lambda _: containers, files, tree, options, where)


class _Survey(NamedTuple):
    tree: Tree
    inner: list[_Member]  # tars in the tar
    holds_samples: bool  # whether files of one image's name, up to the first dot, say its label


def _survey(path: Path, options: SourceOptions, tree: Tree | None = None) -> _Survey:
    """Look through a tar once, adding to `tree` if one is given."""
    with path.open("rb") as file:
        begin = file.read(2)
    if begin in _COMPRESSED:
        raise UserError(
            f"{path}: compressed with {_COMPRESSED[begin]}. Images are read by their place in the tar, so "
            "unpack it first and give the folder or the .tar that was in it."
        )
    tree = tree or Tree()
    inner: list[_Member] = []
    holds_samples = False
    for key, members in groupby(_walk(path), _sample_key):
        suffixes = set()
        for member in members:
            folder, slash, base = member.name.rpartition("/")
            why = options.passes_over_path(member.name)
            tree.add(folder + slash, base, why)
            inner += [member] if why == "*.tar" else []
            suffixes.add("image" if not why else member.name[len(key) + 1 :])
        # Beside images in class folders a text may be anything.
        labels = {"cls"} if "/" in key else {"cls", "json", "txt"}
        holds_samples |= "image" in suffixes and bool(labels & suffixes)
    return _Survey(tree, inner, holds_samples)


class _ClassTar(NamedTuple):
    class_name: str
    container: int
    start: int  # bytes [start, end) of the container, to its end where `end` is None
    end: int | None


def _class_tars(
    kind: str, paths: Sequence[Path], tars: Sequence[_ClassTar], options: SourceOptions, where: Path
) -> Source:
    names = [tar.class_name for tar in tars]
    numbered = [re.fullmatch(r"(.*?)(\d+)", name) for name in names if not _WNID.fullmatch(name)]
    parts = sorted((match[1], int(match[2])) for match in numbered if match)
    in_turn = [(parts[0][0], parts[0][1] + i) for i in range(len(names))] if parts else None
    if options.labels is None and len(names) > 1 and parts == in_turn:
        raise UserError(
            f"{where}: {kind} called {names[0]}, {names[1]} and so on, which may be parts of one set. "
            "`--labels folders` takes each tar for a class, `--labels none` packs all without labels."
        )
    if options.labels is None and all(map(is_split_name, names)):
        raise UserError(
            f"{where}: holds the tars {', '.join(names)}, which are splits, not classes. Unpack it, give one."
        )
    if options.split:
        raise UserError(f"{where}: {kind}, which holds no splits. Leave out --split.")
    label_of = class_labels(names, options.classes, where)

    def files(ignored: Counter[str]) -> Iterator[SourceItem]:
        for class_name, container, start, end in tars:
            for member in _walk(paths[container], start, end):
                if why := options.passes_over_path(member.name):
                    ignored[why] += 1
                else:
                    name = f"{class_name}/{member.name.rpartition('/')[2]}"
                    yield _item(name, member, container, label_of[class_name])

    containers = tuple(file_container(path) for path in paths)
    return Source(kind, tuple(label_of), containers, files)


def _item(name: str, member: _Member, container: int, label: int = UNKNOWN_LABEL) -> SourceItem:
    return SourceItem(name, "", container, member.offset, member.size, 0, label)


class _Sample(NamedTuple):
    image: _Member
    name: str  # its own, or that of its image file
    label: str  # as the tar has it; empty where there is none
    class_name: str  # empty where it is not told


def _samples_source(paths: Sequence[Path], options: SourceOptions, where: Path) -> Source:
    """Take samples of WebDataset: an image, its label in `.cls` or `.json`, its name and class in `.json` or key."""
    names_of: dict[str, set[str]] = {}
    for path in paths:
        for sample in _samples(path, options, Counter()):
            names_of.setdefault(sample.label, set()).add(sample.class_name)
    names_of.pop("", None)
    label_of: dict[str, int] = {}
    names: tuple[str, ...] = ()
    if names_of and all(re.fullmatch(r"-?\d{1,18}", label) for label in names_of):
        named = {int(label): min(names) for label, names in names_of.items() if int(label) >= 0}
        alone = all(len(names) == 1 for label, names in names_of.items() if int(label) >= 0)
        if not alone or not all(named.values()) or len(set(named.values())) < len(named):
            named = {}
        numbers = [int(label) for label in names_of]
        names, final = final_classes(named, range(min(numbers), max(numbers) + 1), options.classes, where)
        label_of = {label: final(int(label)) for label in names_of}
    elif names_of:
        label_of = class_labels(names_of, options.classes, where)
        names = tuple(label_of)

    def files(ignored: Counter[str]) -> Iterator[SourceItem]:
        for number, path in enumerate(paths):
            for sample in _samples(path, options, ignored):
                label = label_of.get(sample.label, UNKNOWN_LABEL)
                folder = names[label] if names and label >= 0 and "/" not in sample.name else ""
                yield _item(f"{folder}/{sample.name}" if folder else sample.name, sample.image, number, label)

    kind = f"{len(paths)} tars of samples{'' if label_of else ', unlabelled (label -1)'}"
    return Source(kind, names, tuple(file_container(path) for path in paths), files)


def _samples(path: Path, options: SourceOptions, ignored: Counter[str]) -> Iterator[_Sample]:
    with path.open("rb") as file:

        def content(member: _Member | None) -> bytes:
            if member is None:
                return b""
            file.seek(member.offset)
            return file.read(member.size)

        for key, group in groupby(_walk(path), _sample_key):
            members = {member.name[len(key) + 1 :].lower(): member for member in group}
            images = [suffix for suffix in members if f".{suffix}" in IMAGE_SUFFIXES]
            cls, about = members.pop("cls", None), members.pop("json", None)
            ignored.update(f"*.{suffix}" for suffix in members if suffix not in images[:1])
            if not images:
                continue
            image = members[images[0]]
            told = _json_object(content(about))
            name = next((told[field] for field in ("name", "filename", "file_name") if field in told), None)
            base = image.name.rpartition("/")[2]
            label = content(cls).decode(errors="surrogateescape").strip() or told.get(
                options.label_column or "label", ""
            )
            wnid = re.match(r"(n\d{8})_", base)
            class_name = told.get("wnid") or (wnid[1] if wnid else "")
            yield _Sample(
                image,
                name if isinstance(name, str) and is_image_name(name) else base,
                str(label) if isinstance(label, str | int) else "",
                class_name if isinstance(class_name, str) else "",
            )


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _sample_key(member: _Member) -> str:
    folder, slash, base = member.name.rpartition("/")
    return folder + slash + base.partition(".")[0]


class _Member(NamedTuple):
    name: str  # without empty parts and "."
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
                    name = "/".join(part for part in member.name.split("/") if part not in ("", "."))
                    yield _Member(name, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise damaged(f"{error}: cut or damaged") from error
        # tarfile takes a damaged header for the end; the end is a block of zeros.
        file.seek(tar.offset)
        block = file.read(BLOCK)
    if len(block) < BLOCK or tar.offset + BLOCK > end:
        raise damaged(f"no end-of-archive mark at byte {tar.offset}: the tar was cut")
    if block.strip(b"\0"):
        raise damaged(f"the header at byte {tar.offset} does not match its checksum")
