"""Sources and places as they lie on real disks: spaces, links, hidden files, other members, what may not be read."""

from __future__ import annotations

import errno
import io
import mmap
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.files import explain_disk_errors, write_atomic
from shards.__main__ import main
from shards.manifest import load_index, name_uid
from shards.pack import pack
from shards.sources import SourceOptions, recognise
from shards.verify import verify

ROOT = Path(__file__).parents[2]
MakeFolders = Callable[[Path, int, int], dict[str, bytes]]


def packed(source: Path, output: Path) -> Any:
    return pack(source, output, workers=1, progress=False)


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # a broken second makes a pax header of its own
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def image(make_jpeg: Callable[..., bytes], make_photo: Callable[..., Any]) -> bytes:
    return make_jpeg(make_photo(16, 16))


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_passes_paths_with_spaces_and_a_tilde_as_one_word() -> None:
    given = ["DATA=/data/my images ü/train", "SHARDS=~/two  words"]
    environment = {"PATH": os.environ["PATH"], "HOME": "/home/me"}  # without the flags of a make around this test
    command = ["make", "--dry-run", "--no-print-directory", "shards", *given]
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    words = shlex.split(printed.splitlines()[-1])
    assert words[1:6] == ["-m", "shards", "pack", "--source", "/data/my images ü/train"]
    assert words[6:] == ["--output", "/home/me/two words"]  # make joins what it expands by one space


def test_links_to_classes_nested_folders_and_any_case_are_images_and_hidden_files_are_not(
    tmp_path: Path, image: bytes
) -> None:
    source = tmp_path / "die Bilder ü"
    for name in ("a/x.JPG", "a/y.Jpeg", "b/in/deeper/z.JPEG", "elsewhere/l.jpg"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(image)
    (source / "elsewhere").rename(tmp_path / "elsewhere")
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "empty").mkdir()
    for name in ("a/._x.JPG", "a/.DS_Store", "a/.jpg"):
        (source / name).write_bytes(b"\0\5\26\7")
    manifest = packed(source, tmp_path / "out ü")
    assert manifest.class_names == ("a", "b", "empty", "linked")
    assert manifest.counts == {"quarantined": 0, "verbatim": 4}
    names = ("a/x.JPG", "a/y.Jpeg", "b/in/deeper/z.JPEG", "linked/l.jpg")
    assert set(load_index(tmp_path / "out ü").uid.tolist()) == {name_uid(name) for name in names}
    found = recognise(source, SourceOptions())
    assert len(list(found.items())) == 4
    assert found.ignored == {"hidden files": 3}


def test_links_to_folders_are_followed_and_no_folder_is_counted_twice(tmp_path: Path, image: bytes) -> None:
    root = laid_out(tmp_path / "in", "cat/1.jpg zoo/ant/2.jpg", image, as_tar=False)
    elsewhere = laid_out(tmp_path / "elsewhere", "3.jpg in/4.jpg", image, as_tar=False)
    (root / "dog").mkdir()
    (root / "dog/images").symlink_to(elsewhere)  # a class that holds a link alone
    (root / "eel").symlink_to(elsewhere / "in")  # lies in what the link before leads to
    (root / "a_kitten").symlink_to("cat")  # sorts before the folder that it leads to
    (root / "cat/back").symlink_to(root)
    source = recognise(root, SourceOptions())
    assert source.class_names == ("cat", "dog", "eel", "zoo")
    assert {item.name for item in source.items()} == {"cat/1.jpg", "dog/images/3.jpg", "eel/4.jpg", "zoo/ant/2.jpg"}
    assert source.ignored == {"links to folders that are packed already": 3}
    (tmp_path / "links").mkdir()
    for name in ("cat", "zoo"):  # nothing but links, to a set that lies elsewhere
        (tmp_path / "links" / name).symlink_to(root / name)
    (root / "cat/back").unlink()
    manifest = packed(tmp_path / "links", tmp_path / "out")
    assert (manifest.class_names, manifest.num_rows) == (("cat", "zoo"), 2)


def test_a_tar_is_told_by_its_first_image_not_by_what_lies_before_it(tmp_path: Path, image: bytes) -> None:
    members = {"./._train": b"x", "README.txt": b"hello", "./train/a/1.jpg": image, "./train/b/2.jpg": image}
    manifest = packed(tar_of(tmp_path / "x.tar", members), tmp_path / "out")
    assert manifest.source["kind"] == "a tar of class folders (2 classes)"
    assert sorted(load_index(tmp_path / "out").label.tolist()) == [0, 1]
    inner = {f"./{name}": tar_of(tmp_path / "inner", {"./1.JPEG": image}).read_bytes() for name in ("b.tar", "a.tar")}
    hidden = {"./._a.tar": b"\0\5\26\7", "notes.txt": b""}
    manifest = packed(tar_of(tmp_path / "y.tar", hidden | inner), tmp_path / "out2")
    assert (manifest.source["kind"], manifest.class_names) == ("a tar of 2 class tars", ("a", "b"))


def test_a_tar_of_several_splits_is_refused(tmp_path: Path, image: bytes) -> None:
    tar = tar_of(tmp_path / "x.tar", {"train/a/1.jpg": image, "val/a/1.jpg": image})
    with pytest.raises(UserError, match="holds the folders train, val, which are splits, not classes"):
        packed(tar, tmp_path / "out")


SET = f"a/0.jpg {' '.join(f'b/{i}.jpg' for i in range(9))}"
LAYOUTS: dict[str, tuple[str, dict[str, Any], str]] = {
    # Files, options, and the packed names: the folder before "/" is the class, and there is none without one.
    "mac": ("cat/1.jpg dog/2.jpg __MACOSX/cat/3.jpg cat/._1.jpg", {}, "cat/1.jpg dog/2.jpg"),
    "nas": ("cat/1.jpg cat/@eaDir/1.jpg/THUMB_M.jpg @eaDir/cat/2.jpg dog/2.jpg", {}, "cat/1.jpg dog/2.jpg"),
    "windows": ("$RECYCLE.BIN/1.jpg a/1.jpg b/2.jpg a/Thumbs.db b/thumbs/2.jpg", {}, "a/1.jpg b/2.jpg"),
    "trash": (".Trash-1000/files/9.jpg lost+found/8.jpg a/1.jpg b/2.jpg", {}, "a/1.jpg b/2.jpg"),
    "wrapper": ("imagenette2-160/train/cat/1.jpg imagenette2-160/train/dog/2.jpg", {}, "cat/1.jpg dog/2.jpg"),
    "annotations": ("train/cat/1.jpg train/dog/2.jpg annotations/1.xml README.txt", {}, "cat/1.jpg dog/2.jpg"),
    "split chosen": ("set/train/a/1.jpg set/train/b/2.jpg set/val/a/3.jpg", {"split": "val"}, "a/3.jpg"),
    "tiny": ("train/n1/images/1.jpg train/n1/boxes.txt train/n2/images/2.jpg", {}, "n1/images/1.jpg n2/images/2.jpg"),
    "kaggle": (
        "ILSVRC/Data/CLS-LOC/train/n1/1.jpg ILSVRC/Data/CLS-LOC/train/n2/2.jpg ILSVRC/Data/CLS-LOC/test/3.jpg "
        "ILSVRC/Annotations/CLS-LOC/train/n1/1.xml ILSVRC/ImageSets/CLS-LOC/val.txt LOC_synset_mapping.txt",
        {"split": "train"},
        "n1/1.jpg n2/2.jpg",
    ),
    "class train": ("bus/1.jpg train/2.jpg car/3.jpg", {}, "bus/1.jpg train/2.jpg car/3.jpg"),
    "told to": ("train/1.jpg test/2.jpg", {"labels": "folders"}, "train/1.jpg test/2.jpg"),
    "told to, wrapped": (
        "data_256/a/abbey/1.jpg data_256/a/attic/2.jpg data_256/b/bar/3.jpg",
        {"labels": "folders"},
        "a/abbey/1.jpg a/attic/2.jpg b/bar/3.jpg",
    ),
    "told to, one": ("train/1.jpg train/2.jpg", {"labels": "folders"}, "train/1.jpg train/2.jpg"),
    "flat in a folder": ("images/1.jpg images/2.jpg", {}, "1.jpg 2.jpg"),
    "ignored": ("images/a/1.jpg images/b/2.jpg masks/a/1.png", {"ignore": ("mask*",)}, "a/1.jpg b/2.jpg"),
    "stray beside a wrapper": (f"logo.png set/a/0.jpg {' '.join(f'set/b/{i}.jpg' for i in range(9))}", {}, SET),
    "one stray": ("a/1.jpg a/2.jpg b/3.jpg logo.png", {}, "a/1.jpg a/2.jpg b/3.jpg"),
}
UNCLEAR = {
    "Train/a/1.jpg validation/a/2.jpg": "holds the folders Train, validation, which are splits",
    "training/a/1.jpg testing/a/2.jpg annotations/1.xml": "holds the folders testing, training, which are splits",
    "train2017/1.jpg val2017/2.jpg": "holds the folders train2017, val2017, which are splits",
    "train/a/1.jpg train/b/2.jpg unlabeled/3.jpg": "holds the folders train, which are splits",
    "images/1.jpg masks/1.png": "holds the folder images beside 1 others, and that is no class's name. `--split",
    "art/cat/1.jpg art/dog/2.jpg photo/cat/3.jpg photo/dog/4.jpg": "2 of its 2 folders hold no images but folders",
    "a/abbey/1.jpg a/attic/2.jpg b/bar/3.jpg b/bay/4.jpg": "such as a .abbey, attic.. Which are the classes",
    "set/cat/1.jpg set/dog/2.jpg samples/3.jpg": "1 of its 2 folders hold no images but folders of images",
    "1.jpg 2.jpg 3.jpg best/1.jpg": "3 images lie beside its 1 folders, which hold 1 each",
}


def laid_out(root: Path, names: str, image: bytes, *, as_tar: bool) -> Path:
    files = dict.fromkeys(names.split(), image)
    if as_tar:
        root.mkdir()
        return tar_of(root / "x.tar", files)
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image)
    return root


@pytest.mark.parametrize("as_tar", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_classes_are_told_from_splits_wrappers_and_junk(
    tmp_path: Path, image: bytes, layout: str, as_tar: bool
) -> None:
    names, options, expected = LAYOUTS[layout]
    source = recognise(laid_out(tmp_path / "in", names, image, as_tar=as_tar), SourceOptions(**options))
    found = {item.name: source.class_names[item.label] if item.label >= 0 else "" for item in source.items()}
    assert found == {name: name.rpartition("/")[0].partition("/")[0] for name in expected.split()}


@pytest.mark.parametrize("as_tar", [False, True])
@pytest.mark.parametrize("names", UNCLEAR)
def test_what_is_not_clear_is_refused_with_the_flag_that_decides(
    tmp_path: Path, image: bytes, names: str, as_tar: bool
) -> None:
    source = laid_out(tmp_path / "in", names, image, as_tar=as_tar)
    with pytest.raises(UserError, match=UNCLEAR[names] + ".*`--labels folders` takes each folder for a class"):
        recognise(source, SourceOptions())
    number = len({name for name in names.split() if not name.endswith("xml")})
    assert len(list(recognise(source, SourceOptions(labels="none")).items())) == number
    with pytest.raises(UserError, match=r"no split 'nowhere' among \["):
        recognise(source, SourceOptions(split="nowhere"))


def test_the_plan_is_printed_before_packing(tmp_path: Path, image: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    names = "x/train/cat/1.jpg x/train/dog/2.jpg x/train/dog/3.jpg x/val/cat/4.jpg x/train/dog/5.heic x/train/.a/1.jpg"
    laid_out(tmp_path / "in", names, image, as_tar=False)
    (tmp_path / "in/x/train/eel").mkdir()
    command = ["pack", "--source", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main([*command, "--split", "train"]) == 0
    assert capsys.readouterr().out.splitlines()[:6] == [
        f"{tmp_path / 'in'}: class folders (3 classes)",
        f"Packed is {tmp_path / 'in/x/train'}, 1 images outside it are not.",
        "Beside it, not packed: val (1).",
        "Plan: 3 images of 3 classes, cat (1) to eel (0).",
        "Without an image: 1 classes, eel.",
        "Passed over: hidden folders (1), *.heic (1). HEIC is not read: convert such files first "
        "(`mogrify -format jpg *.heic`).",
    ]


def test_what_is_no_source_at_all_is_named(tmp_path: Path, image: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(image)
    with pytest.raises(UserError, match=r"a.jpg: one image. Give the folder that it lies in"):
        packed(tmp_path / "a.jpg", tmp_path / "out")
    with pytest.raises(UserError, match="/dev/null: neither a file nor a folder"):
        packed(Path("/dev/null"), tmp_path / "out")
    (tmp_path / "a.zip").write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match="compressed with zip"):
        packed(tmp_path / "a.zip", tmp_path / "out")
    tar_of(tmp_path / "text.tar", {"a.txt": b"x"})
    with pytest.raises(UserError, match="a tar without images and without class tars"):
        packed(tmp_path / "text.tar", tmp_path / "out")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dog"], "of type string, not integers"),
        ([0.5, 1.0], "of type double, not integers"),
        ([0, -3], "row 1 has the label -3"),
    ],
)
def test_parquet_labels_that_are_no_class_numbers_are_refused(
    tmp_path: Path, image: bytes, labels: list[Any], message: str
) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "train-00000-of-00294.parquet"
    parquet.write_table(pyarrow.table({"image": [image, image], "label": labels}), path)
    (tmp_path / "._train-00000-of-00294.parquet").write_bytes(b"\0\5\26\7")
    with pytest.raises(UserError, match=message):
        packed(tmp_path, tmp_path.parent / "out")


def test_the_first_parquet_files_of_a_stream_with_plain_bytes_and_absent_labels_are_packed(
    tmp_path: Path, make_jpeg: Callable[..., bytes], make_photo: Callable[..., Any]
) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in").mkdir()
    for number in range(2):
        images = [make_jpeg(make_photo(8, 8 + 2 * number + row)) for row in range(2)]
        table = pyarrow.table({"image": pyarrow.array(images, pyarrow.large_binary()), "label": [number, None]})
        parquet.write_table(table, tmp_path / f"in/train-{number:05d}-of-00294.parquet")
    packed(tmp_path / "in", tmp_path / "out")
    index = load_index(tmp_path / "out")
    assert dict(zip(index.width.tolist(), index.label.tolist(), strict=True)) == {8: 0, 9: -1, 10: 1, 11: -1}


def test_a_folder_that_may_not_be_read_is_not_called_unwritable(
    tmp_path: Path, make_class_folders: MakeFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_class_folders(tmp_path / "in", 2, 2)
    locked = str(tmp_path / "in" / "n01440764")
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path) == locked:
            raise PermissionError(errno.EACCES, "Permission denied", locked)
        return real(path)

    monkeypatch.setattr("shards.sources.folders.os.scandir", scandir)
    with pytest.raises(UserError, match=r"n01440764: cannot be read \(Permission denied\). Make it readable"):
        packed(tmp_path / "in", tmp_path / "out")


def test_what_may_not_be_written_or_has_no_folder_is_named(tmp_path: Path) -> None:
    for named in (tmp_path / "out", tmp_path / "out/a/b", tmp_path, tmp_path / "out.tmp-7", None):
        with (
            pytest.raises(UserError, match=r"out: cannot be written \(Read-only"),
            explain_disk_errors(tmp_path / "out"),
        ):
            raise OSError(errno.EROFS, "Read-only file system", None if named is None else str(named))
    with pytest.raises(UserError, match=r"x.tar: the disk fails \(Input/output error"), explain_disk_errors(tmp_path):
        raise OSError(errno.EIO, "Input/output error", "x.tar")
    with pytest.raises(UserError, match=r"x.jpg: its folder .*none does not exist. Make it"):
        write_atomic(tmp_path / "none" / "x.jpg", b"")


def test_odd_names_and_closed_outputs_are_no_traceback(tmp_path: Path, image: bytes) -> None:
    for name in ("caf\udce9", "ünï", "plain"):  # the first is Latin-1 on disk
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.jpg").write_bytes(image)
    packed(tmp_path / "in", tmp_path / "out")

    def said(arguments: str, encoding: str = "utf-8:strict") -> tuple[int, str, str]:
        command = f"set -o pipefail; {shlex.quote(sys.executable)} -m shards {arguments}"
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        ended = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert "Traceback" not in ended.stderr
        return ended.returncode, ended.stdout, ended.stderr

    output, row = shlex.quote(str(tmp_path / "out")), f"--output {shlex.quote(str(tmp_path / 'x.jpg'))}"
    labels = {said(f"inspect {output} {number} {row}")[1].splitlines()[2] for number in range(3)}
    assert labels == {"label: 0 (caf\\udce9)", "label: 1 (plain)", "label: 2 (ünï)"}
    assert (
        "caf\\udce9" in said(f"pack --source {shlex.quote(str(tmp_path / 'in'))} --output {output}", "ascii:strict")[1]
    )
    for command in (f"inspect {output}", f"verify {output} --workers 1"):
        assert said(f"{command} >&-")[0] == said(f"{command} 2>&-")[0] == 0
        assert said(f"{command} | true")[0] == 128 + signal.SIGPIPE
        assert "the output cannot be written (No space left on device)" in said(f"{command} > /dev/full")[2]


def test_where_nothing_can_be_mapped_the_shards_are_the_same(
    tmp_path: Path, make_class_folders: MakeFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_class_folders(tmp_path / "in", 2, 3)
    (tmp_path / "in/n01440764/n01440764_0.png").write_bytes(b"")  # two names of one key: the listing is written twice
    expected = packed(tmp_path / "in", tmp_path / "mapped")

    def no_mmap(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mmap, "mmap", no_mmap)
    assert packed(tmp_path / "in", tmp_path / "out") == expected
    assert expected.counts["renamed"] == 1


def test_what_a_fresh_mount_holds_is_no_foreign_file(tmp_path: Path, make_class_folders: MakeFolders) -> None:
    make_class_folders(tmp_path / "in", 1, 2)
    for name in ("lost+found", ".snapshot", "$RECYCLE.BIN", "System Volume Information"):
        (tmp_path / "out" / name).mkdir(parents=True)
    packed(tmp_path / "in", tmp_path / "out")
    assert verify(tmp_path / "out", workers=1, progress=False) == []


def test_a_shard_that_may_not_be_read_is_a_fault_of_that_shard(
    tmp_path: Path, make_class_folders: MakeFolders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_class_folders(tmp_path / "in", 1, 2)
    packed(tmp_path / "in", tmp_path / "out")
    real = Path.open

    def refusing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name in ("shard-000000.tar", "classes.json"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    real_open = os.open

    def refusing_descriptor(path: Any, *arguments: Any) -> int:
        if str(path).endswith("shard-000000.tar"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, *arguments)

    monkeypatch.setattr(Path, "open", refusing)
    monkeypatch.setattr(os, "open", refusing_descriptor)
    assert [str(fault) for fault in verify(tmp_path / "out", workers=1, progress=False)] == [
        "classes.json: cannot be read: Permission denied",
        "shard-000000.tar: cannot be read: Permission denied",
    ]
    assert main(["inspect", str(tmp_path / "out"), "0"]) == 2
    assert "shard-000000.tar: cannot be opened any more (Permission denied)." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [({"workers": 0}, "workers is 0"), ({"seed": 1 << 63}, "seed is 9223372036854775808. It is an integer of 64 bits")],
)
def test_arguments_out_of_range_are_refused(
    tmp_path: Path, make_class_folders: MakeFolders, options: dict[str, int], message: str
) -> None:
    make_class_folders(tmp_path / "in", 1, 1)
    with pytest.raises(UserError, match=message):
        pack(tmp_path / "in", tmp_path / "out", progress=False, **options)


def test_a_sheet_of_no_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path), "--sheet", "x.png", "--number", "0"]) == 2
    assert "--number is 0" in capsys.readouterr().err
