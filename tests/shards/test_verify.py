"""Every damage to a shard folder is found, and named by shard and row."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UserError
from shards.manifest import load_index, load_manifest, padded
from shards.pack import pack
from shards.verify import Fault, verify

MakeFolders = Callable[[Path, int, int], dict[str, bytes]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_class_folders: MakeFolders) -> Path:
    root = tmp_path_factory.mktemp("verify")
    make_class_folders(root / "in", 2, 6)
    pack(root / "in", root / "shards", rows_per_shard=5, workers=1, progress=False)
    return root / "shards"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "shards"))


def faults_of(folder: Path, decode: float = 0.0) -> list[Fault]:
    return verify(folder, decode=decode, workers=1, progress=False)


def test_a_whole_folder_has_no_fault_with_one_process_or_two(folder: Path) -> None:
    assert faults_of(folder, decode=1.0) == []
    assert verify(folder, decode=1.0, workers=2, progress=False) == []


def test_a_tar_cut_at_any_block_names_the_shard_and_the_first_row_that_suffers(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    content = path.read_bytes()
    index = load_index(folder)
    ends = [int(index.offset[row] + padded(int(index.size[row]))) + 1024 for row in range(5, 10)]
    for size in range(0, len(content), 512):
        path.write_bytes(content[:size])
        found = faults_of(folder)
        assert {fault.file for fault in found} == {path.name}
        assert found[0].what == f"{size} bytes, the manifest says {len(content)}"
        cut_rows = [row for row, end in zip(range(5, 10), ends, strict=True) if size < end]
        named = [fault.row for fault in found if fault.row is not None]
        if size and cut_rows:
            assert named[0] == cut_rows[0], size
        else:
            assert named == []


def test_any_flipped_byte_of_any_header_names_the_shard_and_the_row(folder: Path) -> None:
    path = folder / "shard-000000.tar"
    content = path.read_bytes()
    index = load_index(folder)
    row = 2
    jpeg = int(index.offset[row])
    starts = {".cls": jpeg - 1536, ".jpg": jpeg - 512, ".json": jpeg + padded(int(index.size[row]))}
    for suffix, start in starts.items():
        assert content[start : start + 100].rstrip(b"\0").endswith(suffix.encode())
        for place in range(start, start + 512):
            path.write_bytes(content[:place] + bytes([content[place] ^ 0x04]) + content[place + 1 :])
            found = faults_of(folder)
            assert {(fault.file, fault.row) for fault in found} == {(path.name, row)}, place


def test_any_flipped_byte_of_a_sample_names_the_shard_and_the_row(folder: Path) -> None:
    path = folder / "shard-000000.tar"
    content = path.read_bytes()
    index = load_index(folder)
    start, end = int(index.offset[3]) - 1536, int(index.offset[4]) - 1536
    # Every byte of label, description and padding; of the JPEG every 97th.
    jpeg = range(int(index.offset[3]), int(index.offset[3] + index.size[3]))
    for place in (place for place in range(start, end) if place not in jpeg or place % 97 == 0):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x01]) + content[place + 1 :])
        assert {(fault.file, fault.row) for fault in faults_of(folder)} == {(path.name, 3)}, place


def test_a_flipped_byte_in_the_end_of_the_archive_names_the_shard(folder: Path) -> None:
    path = folder / "shard-000002.tar"
    content = path.read_bytes()
    path.write_bytes(content[:-3] + b"x" + content[-2:])
    (fault,) = faults_of(folder)
    assert (fault.file, fault.row) == (path.name, None)
    assert "the end of the archive is not" in fault.what


def test_members_in_another_order_name_every_row_moved(folder: Path) -> None:
    path = folder / "shard-000000.tar"
    content = path.read_bytes()
    starts = [int(offset) - 1536 for offset in load_index(folder).offset[:5]]
    first, second = content[starts[1] : starts[2]], content[starts[2] : starts[3]]
    path.write_bytes(content[: starts[1]] + second + first + content[starts[3] :])
    assert {fault.row for fault in faults_of(folder)} == {1, 2}
    jpeg, label = content[starts[1] + 1024 : starts[2]], content[starts[1] : starts[1] + 1024]
    path.write_bytes(content[: starts[1]] + jpeg + label + content[starts[2] :])
    assert {fault.row for fault in faults_of(folder)} == {1}


def test_two_shards_exchanged_are_both_named(folder: Path) -> None:
    a, b = folder / "shard-000000.tar", folder / "shard-000001.tar"
    contents = a.read_bytes(), b.read_bytes()
    a.write_bytes(contents[1])
    b.write_bytes(contents[0])
    assert {fault.file for fault in faults_of(folder)} == {a.name, b.name}


def test_missing_and_extra_files_are_named(folder: Path) -> None:
    (folder / "shard-000001.tar").unlink()
    (folder / "shard-000009.tar").write_bytes(b"")
    (folder / "notes.txt").write_text("mine")
    (folder / "classes.json").write_text("[]")
    assert [str(fault).split(" (")[0] for fault in faults_of(folder)] == [
        "shard-000001.tar: missing, though the manifest lists it",
        "notes.txt: extra: not in the manifest",
        "shard-000009.tar: extra: not in the manifest",
        "classes.json: sha256 differs",
    ]


def test_a_damaged_index_is_named_and_shards_are_still_checked_by_hash(folder: Path) -> None:
    index = bytearray((folder / "index.npz").read_bytes())
    index[300] ^= 1
    (folder / "index.npz").write_bytes(index)
    path = folder / "shard-000001.tar"
    content = path.read_bytes()
    path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    files = [fault.file for fault in faults_of(folder)]
    assert files == ["index.npz", "shard-000001.tar"]


def test_what_decodes_to_another_size_or_not_at_all_is_named_even_where_all_hashes_agree(
    tmp_path: Path, make_class_folders: MakeFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_class_folders(tmp_path / "in", 1, 4)
    pack(tmp_path / "in", tmp_path / "out", workers=1, progress=False)
    real = load_index(tmp_path / "out")

    def wrong(data: bytes, **_: object) -> object:
        raise ValueError(f"Corrupt JPEG data: {len(data)} bytes")

    monkeypatch.setattr("shards.verify.simplejpeg.decode_jpeg", wrong)
    assert [fault.row for fault in faults_of(tmp_path / "out", decode=1.0)] == [0, 1, 2, 3]
    half = verify(tmp_path / "out", decode=0.5, workers=1, progress=False)
    assert [(fault.row, fault.what) for fault in half] == [
        (row, f"its JPEG does not decode: Corrupt JPEG data: {real.size[row]} bytes") for row in (0, 2)
    ]
    assert verify(tmp_path / "out", decode=0.0, workers=1, progress=False) == []


def test_verification_without_a_manifest_or_with_a_wrong_share_is_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match=re.escape("decode is 7. It is a share of the rows: 0 to 1.")):
        verify(folder, decode=7)
    assert load_manifest(folder).num_rows == 12
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"holds no manifest.json"):
        verify(folder)
