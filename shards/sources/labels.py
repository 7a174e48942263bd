"""Lists of labels for images that lie without class folders, in the forms in which people have them."""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from common.errors import UserError
from shards.manifest import UNKNOWN_LABEL

IMAGE_SUFFIXES = set(".jpg .jpeg .jpe .jfif .png .gif .webp .bmp .tif .tiff .ppm .pgm .avif .jp2".split())
MAX_CLASSES = 1 << 20  # a label above is an id or a time, and a list of so many names would fill the memory
Classes = tuple[str, ...] | None  # in label order; None stands for those that are found, sorted

_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_META = "meta.mat"
_VAL_IMAGE = "ILSVRC2012_val_{:08d}.JPEG"
_FORMS = (
    "Known are: the devkit (ILSVRC2012_devkit_t12.tar.gz or its folder), its ground truth text beside "
    "meta.mat, LOC_val_solution.csv, a table (.csv, .tsv, .jsonl) of files and labels, a text of lines `file class`, "
    "a text of one wnid a line."
)
_FILE_TITLES = ("file_name", "filename", "file", "path", "filepath", "image_path", "image", "image_id", "id", "name")
_LABEL_TITLES = ("label", "labels", "class", "class_name", "classname", "category", "target", "wnid", "label_id")
_FILE_AND_LABEL = re.compile(
    rf"(.+?(?:{'|'.join(re.escape(suffix) for suffix in sorted(IMAGE_SUFFIXES))}))\s+(\S.*?)(?:(?:\s+-?\d+){{4}})?",
    re.I,
)
# Where labels of ILSVRC2012_val images are looked for, in this order, beside the images.
FILES_BESIDE = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12", "LOC_val_solution.csv", _GROUND_TRUTH)


@dataclass(frozen=True)
class LabelList:
    """The label of each file name and the classes in label order."""

    label_of: dict[str, int] | None  # None, and no classes: all images stay unlabelled
    class_names: tuple[str, ...]

    def __str__(self) -> str:
        return "unlabelled (label -1)" if self.label_of is None else f"{len(self.label_of)} labels from a list"

    @cached_property
    def _by_base(self) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for name, label in (self.label_of or {}).items():
            found.setdefault(name.rpartition("/")[2], set()).add(label)
        return found

    def name_and_label(self, name: str, where: Path) -> tuple[str, int]:
        """Return the name that an image would have in class folders, and its label.

        A list may name more or fewer folders than there are, and leave the suffix out.

        Raises:
            UserError: the image is not listed, or under several labels.
        """
        if self.label_of is None:
            return name, UNKNOWN_LABEL
        parts = name.split("/")
        tails = ["/".join(parts[first:]) for first in range(len(parts))]
        spellings = [*tails, *(tail.rpartition(".")[0] for tail in tails)]
        labels = {self.label_of[spelling] for spelling in spellings if spelling in self.label_of}
        labels = labels or self._by_base.get(tails[-1]) or self._by_base.get(spellings[-1]) or set()
        if len(labels) != 1:
            what = f"is listed under {len(labels)} labels" if labels else "has no entry"
            raise UserError(
                f"{where}: {name} {what} in the list of labels ({len(self.label_of)} entries). "
                "Pass the list that belongs to these images, or `--labels none` to pack without labels."
            )
        (label,) = labels
        return f"{self.class_names[label]}/{name}", label


UNLABELLED = LabelList(None, ())


def is_image_name(name: str) -> bool:
    """Tell whether a file name has an image's suffix and is not hidden."""
    base = name.rpartition("/")[2]
    stem, dot, suffix = base.rpartition(".")
    # macOS lays `._a.jpg` beside `a.jpg`.
    return stem != "" and not base.startswith(".") and dot + suffix.lower() in IMAGE_SUFFIXES


def labels_beside(first_image: str, folder: Path, classes: Classes) -> LabelList:
    """Find the labels of images without class folders: those of ImageNet's validation images, by their name.

    UserError where there is no list of these at `folder` or in the four folders above it.
    """
    if not first_image.startswith("ILSVRC2012_val_"):
        return UNLABELLED
    for place in (folder, *folder.absolute().parents[:4]):
        for name in FILES_BESIDE:
            if (place / name).exists():
                return load_labels(place / name, classes)
    raise UserError(
        f"{folder}: validation images of ImageNet, and no list of their labels beside them (looked for "
        f"{', '.join(FILES_BESIDE)}). Give one by --labels, or `--labels none` to pack without labels."
    )


def load_labels(path: Path, classes: Classes, label_column: str | None = None) -> LabelList:
    """Read a list of labels, whatever its form; classes are sorted unless `classes` gives their order.

    Raises:
        UserError: the form is not known, a file is missing, or a class is not among `classes`.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file. Give the list of labels by --labels. {_FORMS}")
    if path.is_dir():
        truth, meta = _find(path, _GROUND_TRUTH), _find(path, _META)
        return _from_devkit(truth.read_text(), meta.read_bytes(), path, classes)
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return _from_devkit_tar(path, classes)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text in UTF-8 ({error}). {_FORMS}") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if path.suffix in (".jsonl", ".ndjson"):
        return _named(_from_json_lines(lines, path, label_column), path, classes)
    if path.suffix in (".csv", ".tsv") or (lines and "\t" in lines[0]):
        delimiter = max(",;\t", key=lines[0].count) if lines else ","
        rows = list(csv.reader(lines, delimiter=delimiter))
        return _named(_from_table(rows, path, label_column), path, classes)
    pairs = [_FILE_AND_LABEL.fullmatch(line.strip()) for line in lines]
    if pairs and all(pairs):
        return _named(_one_label_each(((pair[1], pair[2]) for pair in pairs if pair), path), path, classes)
    words = [line.split() for line in lines]
    widths = {len(line) for line in words}
    if widths == {2}:
        return _named(_one_label_each(words, path), path, classes)
    if widths == {1} and all(line[0].isdigit() for line in words):
        return _from_devkit(text, _find(path.parent, _META).read_bytes(), path, classes)
    if widths == {1}:
        return _named({_VAL_IMAGE.format(i): line[0] for i, line in enumerate(words, 1)}, path, classes)
    raise UserError(f"{path}: lines of {sorted(widths)} words, no form of label list that is known. {_FORMS}")


def _from_json_lines(lines: list[str], path: Path, label_column: str | None) -> dict[str, str]:
    try:
        found = [json.loads(line) for line in lines]
        header = list(found[0])
        rows = [[str(row[column]) for column in header] for row in found]
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its lines are not JSON objects with the same keys ({error!r}). {_FORMS}") from error
    return _from_table([header, *rows], path, label_column)


def _from_table(rows: list[list[str]], path: Path, label_column: str | None) -> dict[str, str]:
    """Return the label of each file of a table, with a header or without one."""
    if rows and rows[0][:2] == ["ImageId", "PredictionString"]:  # Kaggle's: the class before its boxes
        return _one_label_each(((f"{row[0]}.JPEG", row[1].split()[0]) for row in rows[1:]), path)
    wanted = [label_column.lower()] if label_column else list(_LABEL_TITLES)
    titles = [cell.strip().lower() for cell in rows[0]] if rows else []
    has_header = not any(map(is_image_name, titles)) and bool({*titles} & {*_FILE_TITLES, *_LABEL_TITLES, *wanted})
    body = rows[1:] if has_header else rows
    of_images = [i for i in range(len(titles)) if body and all(is_image_name(row[i]) for row in body if i < len(row))]
    files = of_images or [titles.index(title) for title in _FILE_TITLES if has_header and title in titles]
    if not files or not body:
        raise UserError(f"{path}: {len(body)} rows, and no column of file names in {rows[:1]}. {_FORMS}")
    labels = [titles.index(title) for title in wanted if has_header and title in titles]
    if not labels and not label_column and (len(titles) == 2 or not has_header):
        labels = [i for i in (files[0] + 1, files[0] - 1) if 0 <= i < len(titles)]
    if not labels:
        raise UserError(f"{path}: no column of labels in {rows[0]}. Name it by --label-column.")
    short = next((row for row in body if len(row) <= max(files[0], labels[0]) or not row[labels[0]].strip()), None)
    if short is not None:
        raise UserError(f"{path}: the row {short} has no label. Complete it, or leave such images out.")
    return _one_label_each(((row[files[0]].strip(), row[labels[0]].strip()) for row in body), path)


def _one_label_each(pairs: Iterable[Sequence[str]], path: Path) -> dict[str, str]:
    label_of: dict[str, str] = {}
    for file, label in pairs:
        name = file.removeprefix("./")
        if (other := label_of.setdefault(name, label)) != label:
            raise UserError(
                f"{path}: {name} is listed as {other!r} and as {label!r}. An image has one label: keep "
                "one of its lines, or pack by `--labels none`."
            )
    return label_of


def load_classes(path: Path) -> tuple[str, ...]:
    """Read a class list: JSON, either a list in label order or a mapping from class to label.

    Raises:
        UserError: it is neither, or labels are not 0..n-1, each once.
    """
    wanted = 'Give a JSON list of names in label order, or {"name": label, ...} with labels 0..n-1.'
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. {wanted}") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}). {wanted}") from error
    if isinstance(content, dict) and sorted(content.values()) == list(range(len(content))):
        content = sorted(content, key=content.__getitem__)
    if not isinstance(content, list) or not content or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path}: no class list, but {str(content)[:60]!r}. {wanted}")
    if len(set(content)) != len(content):
        raise UserError(f"{path}: a class is listed twice among {len(content)}. {wanted}")
    return tuple(content)


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / "data" / name, *sorted(folder.glob(f"*/data/{name}"))):
        if candidate.is_file():
            return candidate
    raise UserError(f"{folder}: holds no {name}, neither here nor in data/. {_FORMS}")


def _from_devkit_tar(path: Path, classes: Classes) -> LabelList:
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz" if path.name.endswith("gz") else "r:") as archive:
            for member in archive:
                base = member.name.rpartition("/")[2]
                if base in (_GROUND_TRUTH, _META) and (content := archive.extractfile(member)) is not None:
                    found[base] = content.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as a tar ({error}). Download the devkit again.") from error
    for name in (_GROUND_TRUTH, _META):
        if name not in found:
            raise UserError(f"{path}: holds no {name}. {_FORMS}")
    return _from_devkit(found[_GROUND_TRUTH].decode(), found[_META], path, classes)


def _from_devkit(truth: str, meta: bytes, where: Path, classes: Classes) -> LabelList:
    """Map the devkit's own ids, line i for validation image i, to wnids by the order in meta.mat."""
    wnid_of = _wnids_of_devkit(meta, where)
    named: dict[str, str] = {}
    for number, class_id in enumerate(truth.split(), 1):
        if int(class_id) not in wnid_of:
            raise UserError(
                f"{where}: line {number} of the ground truth is class id {class_id}, {_META} has no such leaf class "
                f"among {len(wnid_of)}. The two files do not belong together: take both from one devkit."
            )
        named[_VAL_IMAGE.format(number)] = wnid_of[int(class_id)]
    return _named(named, where, classes or tuple(sorted(wnid_of.values())))


def _wnids_of_devkit(meta: bytes, where: Path) -> dict[int, str]:
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise UserError(
            f"{where}: reading {_META} needs scipy, which is not installed. `pip install scipy`, or give a "
            "text of one wnid a line by --labels."
        ) from error
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = [synset for synset in synsets if int(synset["num_children"]) == 0]
        return {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in leaves}
    except (MatReadError, ValueError, KeyError, TypeError, IndexError, OSError) as error:
        raise UserError(
            f"{where}: {_META} cannot be read ({error}). Take it from ILSVRC2012_devkit_t12.tar.gz again."
        ) from error


def _named(named: dict[str, str], where: Path, classes: Classes) -> LabelList:
    """Turn class names, or numbers where all are numbers, into labels."""
    found = sorted(set(named.values()))
    if found and all(name.isdecimal() and name.isascii() for name in found):
        numbers = sorted(int(name[:18]) for name in found)
        names, final = final_classes({}, numbers, classes, where)
        return LabelList({file: final(int(name)) for file, name in named.items()}, names)
    names = classes or tuple(found)
    label_of = {name: label for label, name in enumerate(names)}
    if missing := [name for name in found if name not in label_of]:
        raise UserError(
            f"{where}: class {missing[0]!r} is not among the {len(names)} classes given. "
            "Give the class list that these labels belong to."
        )
    return LabelList({file: label_of[name] for file, name in named.items()}, names)


def class_labels(found: Collection[str], classes: Classes, where: Path | str) -> dict[str, int]:
    """Return the label of each class, in label order: sorted, or as `classes` gives them; UserError if it lacks one."""
    names = sorted(set(found)) if classes is None else classes
    missing = sorted(set(found).difference(names))
    if missing:
        raise UserError(
            f"{where}: class {missing[0]!r} ({len(missing)} in all) is not among the {len(names)} of the "
            "class list. Pass the list that these images belong to, or leave it out."
        )
    return {name: label for label, name in enumerate(names)}


def final_classes(
    named: Mapping[int, str], numbers: Sequence[int], classes: Classes, where: Path | str
) -> tuple[tuple[str, ...], Callable[[int], int]]:
    """Return the classes in label order, and the function from a label of the source to the final one.

    Labels keep their order, as Hugging Face's ImageNet is in the order of sorted wnids already, unless the names are
    all there and wnids out of order, or `classes` gives another order of the names.

    Args:
        named: the names of classes that the source tells, by its label.
        numbers: the labels that occur, the lowest first, the highest last; -1 is unknown.
        classes: in label order, as the user gives them.
        where: the source, for messages.

    Raises:
        UserError: a label has no class, or is no number of a class at all.
    """
    lowest, highest = numbers[0], numbers[-1]
    if lowest < UNKNOWN_LABEL or highest >= MAX_CLASSES:
        wrong = lowest if lowest < UNKNOWN_LABEL else highest
        raise UserError(
            f"{where}: label {wrong}, which is no class's number: these are 0 to {MAX_CLASSES - 1}, -1 where unknown. "
            "Name the column of classes by --label-column, or pack by `--labels none`."
        )
    if named and highest > max(named):
        raise UserError(f"{where}: label {highest}, but {len(named)} classes are named. Get the files of one set.")
    count = max(named) + 1 if named else highest + 1
    names = tuple(named.get(label, str(label)) for label in range(count))
    repeated = {name for name, times in Counter(names).items() if times > 1}
    # Two classes of one name stay two: ImageNet has two cranes.
    names = tuple(f"{name}#{label}" if name in repeated else name for label, name in enumerate(names))
    if classes is None and len(named) == count and all(re.fullmatch(r"n\d{8}", name) for name in names):
        classes = tuple(sorted(names))
    if classes is None:
        return names, lambda label: label
    if not named:
        if highest >= len(classes):
            raise UserError(f"{where}: label {highest}, but {len(classes)} classes are named. Give --classes.")
        return classes, lambda label: label
    position = class_labels([names[label] for label in named], classes, where)
    return classes, lambda label: position[names[label]] if label >= 0 else label
