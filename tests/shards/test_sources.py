"""Small copies of the layouts that people have, each packed and compared with class folders of the same images."""

from __future__ import annotations

import builtins
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from shards.manifest import Manifest, load_index, name_uid
from shards.pack import pack
from shards.sources import SourceOptions, recognise
from shards.sources.labels import load_classes

Files = dict[str, bytes]
VAL_NAME = "ILSVRC2012_val_{:08d}.JPEG"


@pytest.fixture(scope="module")
def train(
    tmp_path_factory: pytest.TempPathFactory, make_class_folders: Callable[[Path, int, int], Files]
) -> tuple[Path, Files]:
    root = tmp_path_factory.mktemp("sources") / "train"
    return root, make_class_folders(root, 4, 6)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a member as GNU tar wrote ImageNet's: owner, mode and times set, no pax headers."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime, info.uname, info.gname = len(data), 0o644, 1339600000, "jiadeng", "users"
    tar.addfile(info, io.BytesIO(data))


def tar_of(files: Files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files.items():
            add(tar, name, data)
    return buffer.getvalue()


def class_tars(files: Files) -> Files:
    classes = sorted({name.split("/")[0] for name in files}, reverse=True)
    return {
        f"{wnid}.tar": tar_of({n.split("/")[1]: d for n, d in files.items() if n.startswith(wnid)}) for wnid in classes
    }


def packed(source: Path, output: Path, **options: Any) -> Manifest:
    return pack(source, output, rows_per_shard=10, workers=1, progress=False, options=SourceOptions(**options))


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.suffix in (".tar", ".npz")}


def test_imagenets_train_tar_its_class_tars_and_a_tar_of_folders_give_the_shards_of_the_class_folders(
    train: tuple[Path, Files], tmp_path: Path
) -> None:
    root, files = train
    from_folders = packed(root, tmp_path / "folders")
    assert from_folders.source["kind"] == "class folders (4 classes)"
    outer = tmp_path / "ILSVRC2012_img_train.tar"
    outer.write_bytes(tar_of(class_tars(files)))
    side_by_side = tmp_path / "class_tars"
    side_by_side.mkdir()
    for name, data in class_tars(files).items():
        (side_by_side / name).write_bytes(data)
    of_folders = tmp_path / "all.tar"
    of_folders.write_bytes(tar_of({f"./train/{name}": data for name, data in files.items()}))
    for source, kind in (
        (outer, "a tar of 4 class tars"),
        (side_by_side, "a folder of 4 class tars"),
        (of_folders, "a tar of class folders (4 classes)"),
    ):
        manifest = packed(source, tmp_path / f"from_{source.stem}")
        assert manifest.source["kind"] == kind
        assert tars(tmp_path / f"from_{source.stem}") == tars(tmp_path / "folders")
        assert manifest.class_names == from_folders.class_names


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory, train: tuple[Path, Files]) -> tuple[Path, Files]:
    """A val tar as downloaded, the devkit beside it, and its images by the name they have in class folders."""
    _, files = train
    folder = tmp_path_factory.mktemp("val")
    wnids = [name.split("/")[0] for name in files]
    images = {VAL_NAME.format(number): data for number, data in enumerate(files.values(), 1)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(images))
    # The devkit numbers its leaf classes in an order of its own, and lists inner nodes after them.
    classes = sorted(set(wnids))
    devkit_order = [classes[2], classes[0], classes[3], classes[1]]
    truth = "".join(f"{devkit_order.index(wnid) + 1}\n" for wnid in wnids)
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta_mat([*devkit_order, "n00001740"]))
        add(tar, "ILSVRC2012_devkit_t12/readme.txt", b"...")
    names = [f"{wnid}/{image}" for wnid, image in zip(wnids, images, strict=True)]
    return folder, dict(zip(names, images.values(), strict=True))


def meta_mat(wnids: list[str]) -> bytes:
    """The devkit's meta.mat: `synsets`, a column of structs; the last one here has children."""
    scipy_io = pytest.importorskip("scipy.io")
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    synsets = np.zeros((len(wnids), 1), [(field, "O") for field in [*fields, "num_train_images"]])
    for number, wnid in enumerate(wnids):
        inner = number == len(wnids) - 1
        children = np.array([1.0, 2.0]) if inner else np.zeros(0)
        synsets[number, 0] = (number + 1, wnid, "words", "gloss", len(children), children, int(inner), 1300)
    buffer = io.BytesIO()
    scipy_io.savemat(buffer, {"synsets": synsets})
    return buffer.getvalue()


def label_lists(folder: Path, files: Files) -> Iterator[tuple[str, Path]]:
    """Every form of the val labels that is known, made from the same images."""
    yield "devkit tar", folder / "ILSVRC2012_devkit_t12.tar.gz"
    unpacked = folder / "unpacked"
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz") as tar:
        tar.extractall(unpacked, filter="data")
    yield "devkit folder", unpacked / "ILSVRC2012_devkit_t12"
    yield "ground truth", unpacked / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    for name, text in label_texts(files):
        (folder / "lists").mkdir(exist_ok=True)
        (folder / "lists" / name).write_text(text)
        yield name, folder / "lists" / name


def label_texts(files: Files) -> Iterator[tuple[str, str]]:
    """Those forms that are texts, by the names that they have."""
    pairs = [name.split("/") for name in files]
    yield from {
        "synset_labels.txt": "".join(f"{wnid}\n" for wnid, _ in pairs),
        "val.txt": "".join(f"val/{image} {wnid}\n" for wnid, image in reversed(pairs)),
        "LOC_val_solution.csv": "ImageId,PredictionString\n"
        + "".join(f"{image[:-5]},{wnid} 1 2 3 4 {wnid} 5 6 7 8 \n" for wnid, image in pairs),
    }.items()


def test_imagenets_val_tar_gives_the_shards_of_val_class_folders_by_every_form_of_label_list(
    val: tuple[Path, Files], tmp_path: Path
) -> None:
    folder, files = val
    for name, data in files.items():
        path = tmp_path / "val" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    packed(tmp_path / "val", tmp_path / "folders")
    expected = tars(tmp_path / "folders")
    found_beside = packed(folder / "ILSVRC2012_img_val.tar", tmp_path / "beside")
    assert found_beside.source["kind"] == "a tar of images, 24 labels from a list"
    assert tars(tmp_path / "beside") == expected
    for form, path in label_lists(folder, files):
        packed(folder / "ILSVRC2012_img_val.tar", tmp_path / form, labels=str(path))
        assert tars(tmp_path / form) == expected, form
    flat = tmp_path / "flat"
    flat.mkdir()
    for name, data in files.items():
        (flat / name.split("/")[1]).write_bytes(data)
    packed(flat, tmp_path / "from_flat", labels=str(folder / "ILSVRC2012_devkit_t12.tar.gz"))
    assert tars(tmp_path / "from_flat") == expected


def test_kaggles_layout_gives_the_shards_of_train_and_val_class_folders(
    train: tuple[Path, Files], val: tuple[Path, Files], tmp_path: Path
) -> None:
    root = tmp_path / "imagenet-object-localization-challenge"
    images = root / "ILSVRC/Data/CLS-LOC"
    shutil.copytree(train[0], images / "train")
    (root / "ILSVRC/Annotations/CLS-LOC/val").mkdir(parents=True)
    (root / "ILSVRC/Annotations/CLS-LOC/val/x.xml").write_text("<annotation/>")
    for folder in ("val", "test"):
        (images / folder).mkdir()
        for name, data in val[1].items():
            (images / folder / name.split("/")[1].replace("_val_", f"_{folder}_")).write_bytes(data)
    for name, data in val[1].items():
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / name).write_bytes(data)
    (root / "LOC_val_solution.csv").write_text(dict(label_texts(val[1]))["LOC_val_solution.csv"])
    with pytest.raises(UserError, match=r"CLS-LOC: holds the folders test, train, val, which are splits"):
        recognise(root, SourceOptions())
    for split, folders in (("train", train[0]), ("val", tmp_path / "val")):
        packed(folders, tmp_path / f"{split}_folders")
        manifest = packed(root, tmp_path / f"{split}_kaggle", split=split)
        assert tars(tmp_path / f"{split}_kaggle") == tars(tmp_path / f"{split}_folders")
        assert manifest.num_classes == 4
    assert packed(root, tmp_path / "test", split="test").class_names == ()


def test_val_images_without_a_label_list_are_an_error_unless_labels_are_waived(
    val: tuple[Path, Files], tmp_path: Path
) -> None:
    alone = tmp_path / "alone" / "ILSVRC2012_img_val.tar"
    alone.parent.mkdir()
    shutil.copy(val[0] / alone.name, alone)
    with pytest.raises(UserError, match=r"no list of their labels beside them .*`--labels none`"):
        packed(alone, tmp_path / "out")
    packed(alone, tmp_path / "out", labels="none")
    assert set(load_index(tmp_path / "out").label.tolist()) == {-1}
    (alone.parent / "short.txt").write_text("n01440764\n")
    with pytest.raises(UserError, match="has no entry in the list of labels \\(1 entries\\)"):
        packed(alone, tmp_path / "short", labels=str(alone.parent / "short.txt"))


def test_a_flat_folder_is_packed_unlabelled_and_says_so(train: tuple[Path, Files], tmp_path: Path) -> None:
    for name, data in train[1].items():
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "flat" / name.split("/")[1]).write_bytes(data)
    (tmp_path / "flat/readme.txt").write_text("not an image")
    (tmp_path / "flat/metadata.csv").write_text("file_name,label\n")
    manifest = packed(tmp_path / "flat", tmp_path / "out")
    assert manifest.source["kind"] == "a folder of images, unlabelled (label -1)"
    assert manifest.class_names == ()
    assert load_index(tmp_path / "out").label.tolist() == [-1] * 24
    source = recognise(tmp_path / "flat", SourceOptions())
    assert len(list(source.items())) == 24
    assert source.ignored == {"*.csv": 1, "*.txt": 1}
    assert source.notes == ("Beside the images lies metadata.csv. --labels takes labels from such a table.",)


@pytest.mark.parametrize("kind", ["folders", "tar", "class tars", "outer tar", "parquet"])
def test_labels_none_packs_every_source_without_labels(train: tuple[Path, Files], tmp_path: Path, kind: str) -> None:
    root, files = train
    source = tmp_path / "in"
    source.mkdir()
    if kind == "folders":
        source = root
    elif kind == "class tars":
        for name, data in class_tars(files).items():
            (source / name).write_bytes(data)
    elif kind == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(hf_table(files), source / "x.parquet")
    else:
        (source / "x.tar").write_bytes(tar_of(files if kind == "tar" else class_tars(files)))
    manifest = packed(source, tmp_path / "out", labels="none")
    assert manifest.class_names == () and manifest.source["kind"].endswith(", unlabelled (label -1)")
    index = load_index(tmp_path / "out")
    assert set(index.uid.tolist()) == {name_uid(name) for name in files}
    assert set(index.label.tolist()) == {-1}
    if kind in ("folders", "tar"):
        notes = recognise(source, SourceOptions(labels="none")).notes
        assert notes == ("24 of 24 images lie in 4 subfolders.",)


def samples(files: Files, *, describe: Callable[[str, int], Files], suffix: str = "jpg") -> bytes:
    """A tar of WebDataset: each image by its file's name, and what `describe` says of its name and label."""
    classes = sorted({name.split("/")[0] for name in files})
    members: Files = {}
    for name, data in files.items():
        key = name.split("/")[1].removesuffix(".JPEG")
        told = describe(name, classes.index(name.split("/")[0]))
        members |= {f"{key}.{suffix}": data} | {f"{key}.{what}": text for what, text in told.items()}
    return tar_of(members)


DESCRIPTIONS: dict[str, Callable[[str, int], Files]] = {
    "timm": lambda name, label: {
        "cls": b"%d" % label,
        "json": json.dumps({"filename": name.split("/")[1], "label": label}).encode(),
    },
    "firn": lambda name, label: {
        "cls": b"%d" % label,
        "json": json.dumps({"name": name, "wnid": name.split("/")[0], "width": 9, "height": 9}).encode(),
    },
    "json alone": lambda name, label: {"json": json.dumps({"label": label, "file_name": name}).encode()},
    "names": lambda name, label: {
        "cls": name.split("/")[0].encode() + b"\n",
        "json": json.dumps({"name": name}).encode(),
    },
}


@pytest.mark.parametrize("form", DESCRIPTIONS)
def test_webdataset_tars_give_the_shards_of_the_class_folders(
    train: tuple[Path, Files], tmp_path: Path, form: str
) -> None:
    root, files = train
    expected = packed(root, tmp_path / "folders")
    (tmp_path / "in").mkdir()
    for number in range(3):
        part = {name: files[name] for name in list(files)[number::3]}
        data = samples(part, describe=DESCRIPTIONS[form])
        (tmp_path / "in" / f"imagenet1k-train-{number:04d}.tar").write_bytes(data)
    manifest = packed(tmp_path / "in", tmp_path / "out")
    assert manifest.class_names == expected.class_names
    assert tars(tmp_path / "out") == tars(tmp_path / "folders")
    (tmp_path / "in/imagenet1k-validation-00.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"holds the splits \['train', 'validation'\]. Choose one by --split"):
        packed(tmp_path / "in", tmp_path / "none")
    assert packed(tmp_path / "in", tmp_path / "val", split="validation").num_rows == 8
    (tmp_path / "one.tar").write_bytes(samples(files, describe=DESCRIPTIONS[form], suffix="jpeg"))
    single = recognise(tmp_path / "one.tar", SourceOptions())
    assert sorted(item.label for item in single.items()) == sorted([0, 1, 2, 3] * 6)


def test_samples_without_labels_and_numbered_tars_are_never_a_class_a_tar(
    train: tuple[Path, Files], tmp_path: Path
) -> None:
    captioned = samples(train[1], describe=lambda name, _: {"txt": b"a photo", "json": b'{"caption": "a photo"}'})
    plain = tar_of({name.split("/")[1]: data for name, data in train[1].items()})
    for folder, data in (("captions", captioned), ("plain", plain)):
        (tmp_path / folder).mkdir()
        for number in range(2):
            (tmp_path / folder / f"{number:05d}.tar").write_bytes(data)
    manifest = packed(tmp_path / "captions", tmp_path / "out")
    assert (manifest.class_names, manifest.num_rows) == ((), 48)
    assert manifest.source["kind"] == "2 tars of samples, unlabelled (label -1)"
    (tmp_path / "splits").mkdir()
    for split, part in (("train", list(train[1])[:12]), ("val", list(train[1])[12:])):
        tree = tar_of({f"imagenet/{split}/{name}": train[1][name] for name in part})
        (tmp_path / "splits" / f"{split}.tar").write_bytes(tree)
    with pytest.raises(UserError, match=r"holds the splits \['train', 'val'\]"):
        recognise(tmp_path / "splits", SourceOptions())
    chosen = recognise(tmp_path / "splits", SourceOptions(split="val"))
    assert {item.name for item in chosen.items()} == set(list(train[1])[12:])
    (tmp_path / "outer.tar").write_bytes(tar_of({"train.tar": plain, "val.tar": plain}))
    with pytest.raises(UserError, match=r"outer.tar: holds the tars train, val, which are splits, not classes"):
        recognise(tmp_path / "outer.tar", SourceOptions())
    with pytest.raises(UserError, match=r"a folder of 2 class tars called 00000, 00001 and so on, which may be parts"):
        recognise(tmp_path / "plain", SourceOptions())
    assert recognise(tmp_path / "plain", SourceOptions(labels="folders")).class_names == ("00000", "00001")
    assert recognise(tmp_path / "plain", SourceOptions(labels="none")).class_names == ()


def hf_table(files: Files, *, features: bool = True, paths: bool = True) -> Any:
    """A table as Hugging Face writes it: image struct<bytes, path>, ClassLabel as int64, names in metadata."""
    pyarrow = pytest.importorskip("pyarrow")
    classes = sorted({name.split("/")[0] for name in files})
    cells = [{"bytes": data, "path": name if paths else None} for name, data in files.items()]
    labels = [classes.index(name.split("/")[0]) for name in files]
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("image", image), ("label", pyarrow.int64())])
    if features:
        label = {"names": classes, "_type": "ClassLabel"}
        info = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
        schema = schema.with_metadata({"huggingface": json.dumps(info)})
    return pyarrow.table([pyarrow.array(cells, image), pyarrow.array(labels, pyarrow.int64())], schema)


def test_hugging_face_parquet_gives_the_shards_of_the_class_folders(train: tuple[Path, Files], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    root, files = train
    packed(root, tmp_path / "folders")
    data = tmp_path / "imagenet-1k" / "data"
    data.mkdir(parents=True)
    names = list(files)
    for number in range(2):
        part = {name: files[name] for name in names[number::2]}
        table = hf_table(files).filter([name in part for name in names])
        parquet.write_table(table, data / f"train-{number:05d}-of-00002-abcdef.parquet", row_group_size=5)
    manifest = packed(tmp_path / "imagenet-1k", tmp_path / "out")
    assert manifest.source["kind"] == "2 parquet files"
    assert tars(tmp_path / "out") == tars(tmp_path / "folders")
    assert not (tmp_path / "out" / ".packing").exists()
    assert packed(tmp_path / "imagenet-1k", tmp_path / "out") == manifest
    parquet.write_table(hf_table(files), data / "validation-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"holds the splits \['train', 'validation'\]. Choose one by --split"):
        packed(tmp_path / "imagenet-1k", tmp_path / "none")
    packed(tmp_path / "imagenet-1k", tmp_path / "val", split="validation")
    assert tars(tmp_path / "val") == tars(tmp_path / "folders")
    with pytest.raises(UserError, match=r"no split 'test' among \['train', 'validation'\]"):
        packed(tmp_path / "imagenet-1k", tmp_path / "none", split="test")


def hf_files(folder: Path, files: Files, names: str) -> Any:
    """Parquet files of these relative names, each with all images; returns the parquet module."""
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(hf_table(files), folder / name)
    return parquet


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("train.parquet test.parquet", "train test"),
        ("plain_text/train-00000-of-00001.parquet plain_text/test-00000-of-00001.parquet", "train test"),
        ("default/train/0000.parquet default/train/0001.parquet default/validation/0000.parquet", "train validation"),
        ("cifar_train.parquet cifar_test.parquet README.md", "train test"),
        ("data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet metadata.parquet", ""),
    ],
)
def test_parquet_files_of_several_splits_are_never_one_set(
    train: tuple[Path, Files], tmp_path: Path, names: str, splits: str
) -> None:
    root = tmp_path / "in"
    parquet = hf_files(root, train[1], names.replace("README.md", ""))
    if "metadata" in names:
        import pyarrow

        parquet.write_table(pyarrow.table({"file": ["x"], "label": [7]}), root / "metadata.parquet")
    if splits:
        with pytest.raises(UserError, match=f"holds the splits {str(sorted(splits.split()))[:-1]}".replace("[", r"\[")):
            recognise(root, SourceOptions())
    found = recognise(root, SourceOptions(split=splits.partition(" ")[0] or None))
    taken = [name for name in names.split() if "train" in name]
    assert [Path(container.path) for container in found.containers] == [root / name for name in taken]


def test_parquet_files_that_do_not_belong_together_are_refused_by_name(
    train: tuple[Path, Files], tmp_path: Path
) -> None:
    import pyarrow

    parquet = hf_files(tmp_path / "in", train[1], "a.parquet b.parquet")
    second, table = tmp_path / "in/b.parquet", hf_table(train[1])

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            packed(tmp_path / "in", tmp_path / "out", **options)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

    refused(r"a.parquet: no column 'lable', but \['image', 'label'\]", label_column="lable")
    parquet.write_table(table.rename_columns(["img", "label"]), second)
    refused(r"b.parquet: no column 'image', but \['img', 'label'\]")
    parquet.write_table(table.drop_columns("label"), second)
    refused(r"b.parquet: no column 'label', but \['image'\]")
    parquet.write_table(table.set_column(1, "label", pyarrow.array(["x"] * 24)), second)
    refused(r"b.parquet: the labels in column 'label' are of type string")
    parquet.write_table(hf_table(train[1], features=False), second)
    refused(r"b.parquet: its classes are None, those of a.parquet \['n01440764")
    parquet.write_table(table.set_column(1, "label", pyarrow.array([2_000_000_000] * 24)), second)
    refused(r"b.parquet: row 0 has the label 2000000000. Labels are 0 to 1048575, -1 where unknown")
    parquet.write_table(table, second, compression="none", use_dictionary=False, row_group_size=6)
    content = bytearray(second.read_bytes())
    content[4:40] = b"\xff" * 36  # the header of the first page
    second.write_bytes(content)
    refused(r"b.parquet: damaged after row 0 \(.*Get the file again")
    parquet.write_table(table.slice(0, 0), second)
    assert packed(tmp_path / "in", tmp_path / "out").num_rows == 24
    parquet.write_table(table.slice(0, 0), tmp_path / "in/a.parquet")
    with pytest.raises(UserError, match=r"in: 2 parquet files without a row"):
        packed(tmp_path / "in", tmp_path / "none")


def test_two_classes_of_one_name_stay_two(train: tuple[Path, Files], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = hf_table(train[1])
    info = {"info": {"features": {"label": {"names": ["crane", "dog", "crane", "ant"]}}}}
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), tmp_path / "x.parquet")
    manifest = packed(tmp_path / "x.parquet", tmp_path / "out")
    assert manifest.class_names == ("crane#0", "dog", "crane#2", "ant")
    assert np.bincount(load_index(tmp_path / "out").label).tolist() == [6, 6, 6, 6]


def test_parquet_beside_images_wins_only_where_it_holds_the_images(train: tuple[Path, Files], tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    shutil.copytree(train[0], tmp_path / "in")
    parquet.write_table(pyarrow.table({"image": ["a/1.jpg"] * 99, "label": [0] * 99}), tmp_path / "in/metadata.parquet")
    assert recognise(tmp_path / "in", SourceOptions()).kind == "class folders (4 classes)"
    hf_files(tmp_path / "in", train[1], "data/train-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"24 images, and parquet files of 24 rows with images.*--ignore '\*.parquet'"):
        recognise(tmp_path / "in", SourceOptions())
    assert recognise(tmp_path / "in", SourceOptions(ignore=("*.parquet",))).kind == "class folders (4 classes)"
    assert recognise(tmp_path / "in/data", SourceOptions()).kind == "1 parquet files"
    for folder in train[0].iterdir():
        shutil.rmtree(tmp_path / "in" / folder.name)
    (tmp_path / "in/logo.png").write_bytes(b"x")
    assert recognise(tmp_path / "in", SourceOptions()).kind == "1 parquet files"


def test_parquet_without_names_paths_or_labels_is_packed_by_row(train: tuple[Path, Files], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    files = train[1]
    source = tmp_path / "images.parquet"
    parquet.write_table(hf_table(files, features=False, paths=False), source)
    manifest = packed(source, tmp_path / "out")
    assert manifest.class_names == ("0", "1", "2", "3")
    index = load_index(tmp_path / "out")
    by_uid = dict(zip(index.uid.tolist(), index.label.tolist(), strict=True))
    assert by_uid == {name_uid(f"images/{row:08d}"): row // 6 for row in range(24)}
    parquet.write_table(hf_table(files).drop_columns("label"), source)
    assert packed(source, tmp_path / "unlabelled").source["kind"] == "1 parquet files, unlabelled (label -1)"
    parquet.write_table(hf_table(files).rename_columns(["image", "fine_label"]), source)
    assert recognise(source, SourceOptions()).notes[0].startswith("Integers without a use: fine_label. --label-column")
    assert recognise(source, SourceOptions(label_column="fine_label")).kind == "1 parquet files"
    parquet.write_table(hf_table(files).drop_columns("label"), source)
    with pytest.raises(UserError, match=r"no column 'img', but \['image'\]"):
        packed(source, tmp_path / "none", image_column="img")


def test_damaged_parquet_and_missing_pyarrow_name_the_file_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    source = tmp_path / "x.parquet"
    source.write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match=r"x.parquet: cannot be read as parquet"):
        packed(source, tmp_path / "out")
    real_import = builtins.__import__

    def no_pyarrow(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_pyarrow)
    with pytest.raises(UserError, match=r"needs pyarrow, which is not installed. `pip install pyarrow`"):
        packed(source, tmp_path / "out")


def test_a_given_class_list_decides_labels_and_must_hold_every_class(train: tuple[Path, Files], tmp_path: Path) -> None:
    root, files = train
    found = sorted({name.split("/")[0] for name in files})
    given = ("n00000001", *reversed(found))
    manifest = packed(root, tmp_path / "out", classes=given)
    assert manifest.class_names == given
    index = load_index(tmp_path / "out")
    by_uid = dict(zip(index.uid.tolist(), index.label.tolist(), strict=True))
    assert by_uid == {name_uid(name): given.index(name.split("/")[0]) for name in files}
    with pytest.raises(UserError, match=f"class '{found[0]}' \\(4 in all\\) is not among the 1"):
        packed(root, tmp_path / "no", classes=("n00000001",))


@pytest.mark.parametrize("text", ['["a", "b"]', '{"b": 1, "a": 0}'])
def test_class_lists_are_lists_or_mappings(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes.json").write_text(text)
    assert load_classes(tmp_path / "classes.json") == ("a", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', "no class list"),
        ("[]", "no class list"),
        ('["a", "a"]', "listed twice"),
        ("{", "not valid JSON"),
        (None, "no such file"),
    ],
)
def test_a_wrong_class_list_says_what_is_wrong(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "classes.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_classes(tmp_path / "classes.json")


def test_a_folder_of_splits_is_refused(train: tuple[Path, Files], tmp_path: Path) -> None:
    shutil.copytree(train[0], tmp_path / "imagenet/train")
    shutil.copytree(train[0], tmp_path / "imagenet/val")
    with pytest.raises(UserError, match="holds the folders train, val, which are splits, not classes"):
        packed(tmp_path / "imagenet", tmp_path / "out")


def test_cut_compressed_and_empty_tars_are_refused_by_name(train: tuple[Path, Files], tmp_path: Path) -> None:
    files = train[1]
    whole = tar_of(class_tars(files))
    path = tmp_path / "ILSVRC2012_img_train.tar"
    for size in (len(whole) // 2, len(whole) // 2 // 512 * 512, 20480):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"ILSVRC2012_img_train.tar: .*(cut|checksum).*get it again"):
            packed(path, tmp_path / "out")
    path.write_bytes(b"\x1f\x8b" + whole)
    with pytest.raises(UserError, match="compressed with gzip"):
        packed(path, tmp_path / "out")
    path.write_bytes(bytes(10240))
    with pytest.raises(UserError, match="a tar without images"):
        packed(path, tmp_path / "out")
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"cut"):
        packed(path, tmp_path / "out")
    damaged = bytearray(whole)
    damaged[600] ^= 4  # a header of the first inner tar
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="the header at byte 512 does not match its checksum"):
        packed(path, tmp_path / "out")


def test_a_folder_of_downloads_names_the_tar_to_give(val: tuple[Path, Files], tmp_path: Path) -> None:
    shutil.copy(val[0] / "ILSVRC2012_img_val.tar", tmp_path)
    with pytest.raises(UserError, match="Give the tar itself"):
        packed(tmp_path, tmp_path.parent / "out")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_tars_are_read(
    tmp_path: Path, form: int, make_jpeg: Callable[..., bytes], make_photo: Callable[..., Any]
) -> None:
    name = "klasse/" + "ä" * 120 + ".jpg"
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:
        add(tar, name, make_jpeg(make_photo(8, 8)))
        add(tar, "klasse/short.jpg", make_jpeg(make_photo(8, 9)))
    packed(tmp_path / "x.tar", tmp_path / "out")
    assert set(load_index(tmp_path / "out").uid.tolist()) == {name_uid(name), name_uid("klasse/short.jpg")}


def test_a_name_met_twice_in_a_tar_is_packed_twice_under_two_names(
    tmp_path: Path, make_jpeg: Callable[..., bytes], make_photo: Callable[..., Any]
) -> None:
    images = [make_jpeg(make_photo(8, width)) for width in (8, 9, 10)]
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for image in images:
            add(tar, "a/same.jpg", image)
    manifest = packed(tmp_path / "x.tar", tmp_path / "out")
    index = load_index(tmp_path / "out")
    widths = dict(zip(index.uid.tolist(), index.width.tolist(), strict=True))
    assert widths == {
        name_uid("a/same.jpg"): 8,
        name_uid("a/same.jpg#2"): 9,
        name_uid("a/same.jpg#3"): 10,
    }
    assert manifest.counts["renamed"] == 3  # one plain key for all three: each carries its id
