"""Lists of labels for images that lie without class folders, in the forms in which people have them."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from shards.manifest import UNKNOWN_LABEL

Classes = tuple[str, ...] | None  # in label order; None stands for those that are found, sorted

_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_META = "meta.mat"
_VAL_IMAGE = "ILSVRC2012_val_{:08d}.JPEG"
_FORMS = (
    "Known are: the devkit (ILSVRC2012_devkit_t12.tar.gz or its folder), its ground truth text beside "
    "meta.mat, LOC_val_solution.csv, a text of lines `file class`, a text of one wnid a line."
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

    def name_and_label(self, name: str, where: Path) -> tuple[str, int]:
        """Return the name that an image would have in class folders, and its label; UserError if it is not listed."""
        if self.label_of is None:
            return name, UNKNOWN_LABEL
        base = name.rpartition("/")[2]
        label = self.label_of.get(base)
        if label is None:
            raise UserError(
                f"{where}: {base} has no entry in the list of labels ({len(self.label_of)} entries). "
                "Pass the list that belongs to these images, or `--labels none` to pack without labels."
            )
        return f"{self.class_names[label]}/{base}", label


UNLABELLED = LabelList(None, ())


def load_labels(path: Path, classes: Classes) -> LabelList:
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
    if path.suffix == ".csv":
        return _named(_kaggle_rows(path), path, classes)
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    widths = {len(line) for line in lines}
    if widths == {2}:
        return _named({name.rpartition("/")[2]: label for name, label in lines}, path, classes)
    if widths == {1} and all(line[0].isdigit() for line in lines):
        return _from_devkit(path.read_text(), _find(path.parent, _META).read_bytes(), path, classes)
    if widths == {1}:
        return _named({_VAL_IMAGE.format(i): line[0] for i, line in enumerate(lines, 1)}, path, classes)
    raise UserError(f"{path}: lines of {sorted(widths)} words, no form of label list that is known. {_FORMS}")


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


def _kaggle_rows(path: Path) -> dict[str, str]:
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    if not rows or rows[0][:2] != ["ImageId", "PredictionString"]:
        raise UserError(f"{path}: the first line is {rows[:1]}, not ImageId,PredictionString. {_FORMS}")
    return {f"{image}.JPEG": boxes.split()[0] for image, boxes in rows[1:]}


def _named(named: dict[str, str], where: Path, classes: Classes) -> LabelList:
    """Turn class names, or numbers where all are numbers, into labels."""
    found = sorted(set(named.values()))
    if all(name.isdigit() for name in found):
        label_of = {name: int(name) for name in found}
        names = classes or tuple(str(number) for number in range(max(label_of.values(), default=-1) + 1))
    else:
        names = classes or tuple(found)
        label_of = {name: label for label, name in enumerate(names)}
    missing = [name for name in found if label_of.get(name, len(names)) >= len(names)]
    if missing:
        raise UserError(
            f"{where}: class {missing[0]!r} is not among the {len(names)} classes given. "
            "Give the class list that these labels belong to."
        )
    return LabelList({file: label_of[name] for file, name in named.items()}, names)
