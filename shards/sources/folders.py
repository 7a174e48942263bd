"""Trees of images, on disk or in a tar: which of their folders are classes, told by how the images lie in them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from common.errors import UserError
from shards.manifest import UNKNOWN_LABEL
from shards.sources.base import Container, Source, SourceItem, SourceOptions, relabelled
from shards.sources.labels import class_labels, labels_beside

_SPLIT_NAME = re.compile(
    r"(ilsvrc\d+[-_]img[-_])?(train(ing|val)?|val(id(ation)?)?|test(ing)?|dev|eval(uation)?)"
    r"([-_ ]?(set|data|images|\d+))*"
)
_HOLDERS = {"images", "image", "imgs", "img", "jpegimages", "jpegs", "data"}  # say nothing of what they hold
_STRAY = 10  # a file of so many may lie beside a folder that holds all others


def is_split_name(name: str) -> bool:
    """Tell whether a folder is called as splits are: train, Val, test2017, ILSVRC2012_img_train, ..."""
    return _SPLIT_NAME.fullmatch(name.lower()) is not None


@dataclass
class Tree:
    """What lies below a root. Folders are relative names that end in "/"; the root is empty."""

    images: Counter[str] = field(default_factory=Counter)  # in each folder that holds some, not below it
    first_image: dict[str, str] = field(default_factory=dict)  # of each such folder
    others: list[str] = field(default_factory=list)  # relative names of tars, parquet files and tables
    empty: list[str] = field(default_factory=list)  # folders in which nothing lies
    ignored: Counter[str] = field(default_factory=Counter)

    def add(self, folder: str, base: str, why: str) -> None:
        """Take note of a file, and of why it is passed over if it is."""
        if not why:
            self.images[folder] += 1
            self.first_image.setdefault(folder, base)
            return
        self.ignored[why] += 1
        if base.endswith((".tar", ".parquet", ".csv", ".tsv", ".jsonl")) and why.startswith("*."):
            self.others.append(folder + base)

    def below(self, prefix: str) -> dict[str, set[str]]:
        """Return the folders directly in one that hold images at any depth, each with its own folders that do."""
        found: dict[str, set[str]] = {}
        for folder in self.images:
            if folder.startswith(prefix) and folder != prefix:
                child, _, rest = folder.removeprefix(prefix).partition("/")
                found.setdefault(child, set()).update([rest.partition("/")[0]] if rest else [])
        return found

    def count(self, prefix: str) -> int:
        """Return the number of images in a folder and below it."""
        return sum(count for folder, count in self.images.items() if folder.startswith(prefix))


def tree_source(
    kind: str,
    containers: Callable[[str], tuple[Container, ...]],
    files: Callable[[str, Counter[str]], Iterator[SourceItem]],
    tree: Tree,
    options: SourceOptions,
    where: Path,
) -> Source:
    """Take the images of a tree: each folder of one level is a class, or there are none.

    Args:
        kind: "folder" or "tar".
        containers: gives the containers in which the images of a folder of the tree lie.
        files: streams the images below a folder of the tree, named from there on, and counts what it passes over.
        tree: what lies there.
        options: labels, classes and split.
        where: the root, for messages.

    Raises:
        UserError: there are no images, or what their folders mean is not clear; names the flags that decide.
    """
    if not tree.images:
        raise UserError(f"{where}: 0 images found. {describe_ignored(tree.ignored)}Check the path and what lies there.")
    if options.label_column and options.labels in (None, "none", "folders"):
        raise UserError(
            f"{where}: a {kind} of images has no column {options.label_column!r}. Leave out --label-column."
        )
    prefix, notes = _split_folder(tree, options.split, where) if options.split else ("", [])
    wrapped = _below_wrappers(tree, prefix)
    if options.labels != "folders" or tree.below(wrapped):  # else the one folder is the class
        prefix = wrapped
    below, at = tree.below(prefix), where / prefix
    if prefix:
        outside = tree.images.total() - tree.count(prefix)
        notes.insert(0, f"Packed is {at}" + (f", {outside} images outside it are not." if outside else "."))
    source = Source("", (), containers(prefix), lambda ignored: files(prefix, ignored))
    if options.labels not in (None, "folders") or not below:
        if options.labels == "folders":
            raise UserError(f"{at}: no folder in it holds images, so none can be a class. Leave out --labels folders.")
        if below:
            inner = tree.count(prefix) - tree.images[prefix]
            notes.append(f"{inner} of {inner + tree.images[prefix]} images lie in {len(below)} subfolders.")
            splits = sorted(filter(is_split_name, below))
            notes += [f"Splits seen: {', '.join(splits)}. All are packed; --split takes one."] if splits else []
        source = replace(source, kind=f"a {kind} of images", notes=tuple(notes))
        if options.labels is not None:
            return source
        if lists := [name for name in tree.others if name.endswith((".csv", ".tsv", ".jsonl"))]:
            notes.append(f"Beside the images lies {lists[0]}. --labels takes labels from such a table.")
            source = replace(source, notes=tuple(notes))
        return relabelled(source, labels_beside(tree.first_image[prefix], at, options.classes), where)
    if options.labels is None:
        _refuse_what_is_unclear(tree, prefix, below, at)
    empty = [folder.removeprefix(prefix)[:-1] for folder in tree.empty if folder.startswith(prefix)]
    label_of = class_labels([*below, *(name for name in empty if "/" not in name)], options.classes, at)

    def labelled(ignored: Counter[str]) -> Iterator[SourceItem]:
        for item in source.files(ignored):
            label = label_of.get(item.name.partition("/")[0]) if "/" in item.name else None
            if label is None:
                ignored["images beside the class folders"] += 1
            else:
                yield item._replace(label=label)

    kind = f"{'class folders' if kind == 'folder' else 'a tar of class folders'} ({len(label_of)} classes)"
    return replace(source, kind=kind, class_names=tuple(label_of), files=labelled, notes=tuple(notes))


def describe_ignored(ignored: Counter[str]) -> str:
    """Return the sentence that says what was passed over; empty where nothing was."""
    if not ignored:
        return ""
    passed_over = ", ".join(f"{reason} ({count})" for reason, count in ignored.items())
    heic = any(reason.lower() in ("*.heic", "*.heif") for reason in ignored)
    advice = "HEIC is not read: convert such files first (`mogrify -format jpg *.heic`). " if heic else ""
    return f"Passed over: {passed_over}. {advice}"


def _split_folder(tree: Tree, split: str, where: Path) -> tuple[str, list[str]]:
    """Return the folder of a split, and what to say of the folders beside it."""
    folders = [folder.split("/")[:-1] for folder in tree.images]
    names = {"/".join(parts[: parts.index(split) + 1]) + "/" for parts in folders if split in parts}
    top = min((name.count("/") for name in names), default=0)
    found = sorted(name for name in names if name.count("/") == top)
    if len(found) == 1:
        beside = sorted(set(tree.below(found[0][: -len(split) - 1])) - {split})
        return found[0], [f"Beside it, not packed: {', '.join(beside[:9])} ({len(beside)})."] if beside else []
    if found:
        raise UserError(f"{where}: several folders are called {split}: {', '.join(found)}. Give one of them as source.")
    beside = sorted(tree.below(_below_wrappers(tree, "")))
    among = f"among {beside[:9]}" if beside else "here, nor any other folder with images"
    raise UserError(f"{where}: no split {split!r} {among}. Give one that is there by --split, or leave it out.")


def _below_wrappers(tree: Tree, prefix: str) -> str:
    """Return the folder below one in which classes or images lie, past folders that hold nothing but one other."""
    while True:
        below = tree.below(prefix)
        if len(below) != 1 or _STRAY * tree.images[prefix] > tree.count(prefix):
            return prefix
        ((child, inside),) = below.items()
        # A class, and not a wrapper, holds images, in a folder `images` at most.
        holders = all(name.lower() in _HOLDERS and tree.images[f"{prefix}{child}/{name}/"] for name in inside)
        is_class = tree.images[f"{prefix}{child}/"] or holders
        if is_class and not is_split_name(child) and child.lower() not in _HOLDERS:
            return prefix
        prefix += f"{child}/"


def _refuse_what_is_unclear(tree: Tree, prefix: str, below: dict[str, set[str]], at: Path) -> None:
    """UserError where folders that hold images may be something else than classes."""
    splits = sorted(filter(is_split_name, below))
    holders = sorted(name for name in below if name.lower() in _HOLDERS)
    deep = sorted(name for name, inside in below.items() if len(inside) > 1 and not tree.images[f"{prefix}{name}/"])
    sizes: Counter[str] = Counter()
    for folder, count in tree.images.items():
        if folder.startswith(prefix) and folder != prefix:
            sizes[folder.removeprefix(prefix).partition("/")[0]] += count
    beside, usual = tree.images[prefix], median(sizes.values())
    whole = "`--labels folders` takes each folder for a class, `--labels none` packs all without labels"
    if len(splits) > 1 or (splits and below[splits[0]]):
        raise UserError(
            f"{at}: holds the folders {', '.join(splits)}, which are splits, not classes. "
            f"Choose one by --split {splits[0]}, and pack each for itself; {whole}."
        )
    if holders:
        raise UserError(
            f"{at}: holds the folder {holders[0]} beside {len(below) - 1} others, and that is no class's name. "
            f"`--split {holders[0]}` packs it alone, `--ignore NAME` passes a folder over; {whole}."
        )
    if deep:
        raise UserError(
            f"{at}: {len(deep)} of its {len(below)} folders hold no images but folders of images, such as {deep[0]} "
            f"({', '.join(sorted(below[deep[0]])[:3])}). Which are the classes? `--split {deep[0]}` takes those in it; "
            f"{whole}."
        )
    if beside > usual:
        raise UserError(
            f"{at}: {beside} images lie beside its {len(below)} folders, which hold {usual:.0f} each. Are these "
            f"classes? `--ignore NAME` passes a folder over; {whole}."
        )


def folder_source(root: Path, tree: Tree, options: SourceOptions) -> Source:
    """Take the images in a folder on disk."""

    def containers(prefix: str) -> tuple[Container, ...]:
        return (Container(str((root / prefix).resolve())),)

    def files(prefix: str, ignored: Counter[str]) -> Iterator[SourceItem]:
        for folder, entries in _walk(root / prefix, options, ignored):
            for entry in entries:
                if why := options.passes_over(entry.name):
                    ignored[why] += 1
                    continue
                try:
                    status = entry.stat()
                    size, mtime = status.st_size, status.st_mtime_ns
                except OSError:  # a dangling link: the packer meets it again, and says so
                    size, mtime = 0, 0
                name = folder + entry.name
                yield SourceItem(name, name, 0, 0, size, mtime, UNKNOWN_LABEL)

    return tree_source("folder", containers, files, tree, options, root)


def survey_folder(root: Path, options: SourceOptions) -> Tree:
    """Look through a folder on disk once."""
    tree = Tree()
    for folder, entries in _walk(root, options, tree.ignored, tree.empty):
        for entry in entries:
            tree.add(folder, entry.name, options.passes_over(entry.name))
    return tree


def _walk(
    root: Path, options: SourceOptions, ignored: Counter[str], empty: list[str] | None = None
) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Yield each folder below `root` and its files. Links to folders are followed last, and no folder twice."""
    seen: set[str] = set()
    folders: list[tuple[str, str]] = [(str(root), "")]
    links: list[tuple[str, str]] = []
    while folders or links:
        path, name = folders.pop() if folders else links.pop(0)
        if (real := os.path.realpath(path)) in seen:
            ignored["links to folders that are packed already"] += 1
            continue
        seen.add(real)
        files: list[os.DirEntry[str]] = []
        inner: list[tuple[str, str]] = []
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        for entry in entries:
            if not entry.is_dir():
                files.append(entry)
            elif why := options.passes_over(entry.name, is_folder=True):
                ignored[why] += 1
            else:
                (links if entry.is_symlink() else inner).append((entry.path, f"{name}{entry.name}/"))
        folders += reversed(inner)
        if empty is not None and not entries:
            empty.append(name)
        yield name, files
