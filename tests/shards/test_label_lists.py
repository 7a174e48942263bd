"""Label lists that cannot be used say what is wrong and which forms are known."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from shards.pack import pack
from shards.sources import SourceOptions, recognise
from shards.sources.labels import load_labels
from shards.workers import hold_as_worker, only_packer


def refused(path: Path, message: str, classes: tuple[str, ...] | None = None) -> None:
    with pytest.raises(UserError, match=message):
        load_labels(path, classes)


def devkit(folder: Path, truth: str, meta: bytes) -> Path:
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    (folder / "data" / "meta.mat").write_bytes(meta)
    return folder


def test_lists_of_no_known_form_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent.txt", r"absent.txt: no such file. Give the list of labels by --labels. Known are")
    (tmp_path / "three.txt").write_text("a b c\nd e\n")
    refused(tmp_path / "three.txt", r"lines of \[2, 3\] words, no form of label list")
    (tmp_path / "x.csv").write_text("x,y\na,1\n")
    refused(tmp_path / "x.csv", r"2 rows, and no column of file names in \[\['x', 'y'\]\]. Known are")
    (tmp_path / "ids.txt").write_text("1\n2\n")
    refused(tmp_path / "ids.txt", r"holds no meta.mat, neither here nor in data/")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"holds no ILSVRC2012_validation_ground_truth.txt")


NESTED = {"a/my cat 1.jpg": "cat", "b/1.jpg": "eel", "b/2.jpg": "big dog"}
TABLES = {
    "header.csv": "file,label\na/my cat 1.jpg,cat\nb/1.jpg,eel\nb/2.jpg,big dog\n",
    "bare.csv": "./a/my cat 1.jpg,cat\nb/1.jpg,eel\nb/2.jpg,big dog\n",
    "excel.csv": "\ufeffid;width;Label\nmy cat 1;3;cat\n1;3;eel\n2;3;big dog\n",
    "metadata.csv": "file_name,text,label\na/my cat 1.jpg,x,cat\nb/1.jpg,y,eel\nb/2.jpg,z,big dog\n",
    "metadata.jsonl": "".join(json.dumps({"file_name": n, "label": c}) + "\n" for n, c in NESTED.items()),
    "val_annotations.txt": "my cat 1.jpg\tcat\t0\t0\t9\t9\n1.jpg\teel\t0\t0\t9\t9\n2.jpg\tbig dog\t0\t1\t2\t3\n",
    "spaces.txt": "in/a/my cat 1.jpg cat\nin/b/1.jpg eel 0 0 9 9\nin/b/2.jpg   big dog\n",
    "species.tsv": "path\tsize\tspecies\na/my cat 1.jpg\t2\tcat\nb/1.jpg\t2\teel\nb/2.jpg\t2\tbig dog\n",
}


@pytest.mark.parametrize("table", TABLES)
def test_tables_of_files_and_labels_label_any_tree(tmp_path: Path, table: str) -> None:
    for name in NESTED:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    (tmp_path / table).write_text(TABLES[table])
    column = "Species" if table == "species.tsv" else None
    source = recognise(tmp_path / "in", SourceOptions(labels=str(tmp_path / table), label_column=column))
    assert source.class_names == ("big dog", "cat", "eel")
    found = {item.path: source.class_names[item.label] for item in source.items()}
    assert found == NESTED
    assert [item.name for item in source.items()] == [f"{label}/{name}" for name, label in NESTED.items()]


@pytest.mark.parametrize(
    ("name", "text"),
    {
        "a.csv": "file,label\nb/1.jpg,cat\n./b/1.jpg,eel\n",
        "a.jsonl": '{"file": "b/1.jpg", "label": "cat"}\n{"file": "b/1.jpg", "label": "eel"}\n',
        "a.tsv": "b/1.jpg\tcat\nb/1.jpg\teel\n",
        "LOC_val_solution.csv": "ImageId,PredictionString\nb/1,cat 1 2 3 4\nb/1,eel 1 2 3 4\n",
        "images.txt": "b/1.jpg cat\nb/1.jpg eel\n",
        "names.txt": "b/1 cat\nb/1 eel\n",
    }.items(),
)
def test_a_file_listed_under_two_labels_is_refused_and_under_one_twice_is_not(
    tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    refused(tmp_path / name, rf"{name}: b/1(.jpg|.JPEG|) is listed as 'cat' and as 'eel'. An image has one label")
    (tmp_path / name).write_text(text.replace("eel", "cat"))
    assert load_labels(tmp_path / name, None).class_names == ("cat",)


def test_a_mistyped_label_column_is_an_error_and_so_is_a_file_of_two_labels(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "1.jpg").write_bytes(b"x")
    (tmp_path / "x.csv").write_text(TABLES["metadata.csv"])
    with pytest.raises(UserError, match=r"no column of labels in \['file_name', 'text', 'label'\]. Name it by"):
        load_labels(tmp_path / "x.csv", None, "lable")
    with pytest.raises(UserError, match=r"a folder of images has no column 'lable'. Leave out --label-column"):
        recognise(tmp_path / "in", SourceOptions(label_column="lable"))
    (tmp_path / "y.csv").write_text("b/1.jpg,cat\nc/1.jpg,dog\n")
    listed = recognise(tmp_path / "in", SourceOptions(labels=str(tmp_path / "y.csv")))
    with pytest.raises(UserError, match=r"1.jpg is listed under 2 labels"):
        list(listed.items())
    (tmp_path / "z.csv").write_text("1.jpg,2000000000\n")
    with pytest.raises(UserError, match=r"label 2000000000, which is no class's number: these are 0 to 1048575"):
        load_labels(tmp_path / "z.csv", None)


def test_a_damaged_devkit_is_refused(tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    (tmp_path / "kit.tar.gz").write_bytes(b"\x1f\x8b not really")
    refused(tmp_path / "kit.tar.gz", "cannot be read as a tar .* Download the devkit again")
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("readme.txt"), io.BytesIO())
    refused(tmp_path / "other.tar.gz", "holds no ILSVRC2012_validation_ground_truth.txt")
    refused(devkit(tmp_path / "a", "1\n", b"not a mat file"), "meta.mat cannot be read")
    synsets = np.zeros((2, 1), [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
    synsets[0, 0], synsets[1, 0] = (1, "n01440764", 0), (2, "n00001740", 5)
    buffer = io.BytesIO()
    scipy_io.savemat(buffer, {"synsets": synsets})
    kit = devkit(tmp_path / "b", "1\n2\n", buffer.getvalue())
    empty = devkit(tmp_path / "c", "", buffer.getvalue())
    assert load_labels(empty, None).label_of == {}
    refused(kit, "line 2 of the ground truth is class id 2, meta.mat has no such leaf class among 1")


def test_numbered_classes_take_their_names_from_the_class_list(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("b.jpg 2\na.jpg 0\n")
    found = load_labels(tmp_path / "val.txt", None)
    assert (found.label_of, found.class_names) == ({"a.jpg": 0, "b.jpg": 2}, ("0", "1", "2"))
    assert load_labels(tmp_path / "val.txt", ("x", "y", "z")).class_names == ("x", "y", "z")
    refused(tmp_path / "val.txt", "label 2, but 2 classes are named. Give --classes", ("x", "y"))
    (tmp_path / "named.txt").write_text("a.jpg x\n")
    assert load_labels(tmp_path / "named.txt", ("y", "x")).label_of == {"a.jpg": 1}
    refused(tmp_path / "named.txt", "class 'x' is not among the 1 classes given", ("y",))


def test_packed_shards_and_empty_files_are_no_source(
    tmp_path: Path, make_class_folders: Callable[[Path, int, int], Any]
) -> None:
    make_class_folders(tmp_path / "in", 1, 2)
    pack(tmp_path / "in", tmp_path / "shards", workers=1, progress=False)
    with pytest.raises(UserError, match=r"holds a manifest.json: it is packed already"):
        pack(tmp_path / "shards", tmp_path / "again", workers=1, progress=False)
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"x.parquet: (0 bytes|cannot be read as parquet|reading parquet needs)"):
        pack(tmp_path / "x.parquet", tmp_path / "again", workers=1, progress=False)


def test_parquet_labels_beyond_the_named_classes_are_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"image": [b"x"], "label": [3]}), tmp_path / "x.parquet")
    options = SourceOptions(classes=("a", "b"))
    with pytest.raises(UserError, match=r"label 3, but 2 classes are named. Give --classes"):
        pack(tmp_path / "x.parquet", tmp_path / "out", workers=1, progress=False, options=options)
    parquet.write_table(pyarrow.table({"image": [7]}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match=r"row 0 holds a int for an image, not bytes"):
        pack(tmp_path / "y.parquet", tmp_path / "out2", workers=1, progress=False)


def test_workers_that_never_end_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr("shards.workers._ORPHANS_END_WITHIN", 0.1)
    expected = r"a worker of an earlier packer has not ended .*fuser .*worker-\d+.lock"
    with hold_as_worker(work), pytest.raises(UserError, match=expected), only_packer(work):
        pass
