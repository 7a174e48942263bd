"""The commands as a user gives them: pack, verify, inspect."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.__main__ import main
from shards.folder import ShardFolder
from shards.inspection import find_row
from shards.manifest import load_index, load_manifest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def packed(
    tmp_path_factory: pytest.TempPathFactory, make_class_folders: Callable[[Path, int, int], dict[str, bytes]]
) -> tuple[Path, dict[str, bytes]]:
    root = tmp_path_factory.mktemp("commands")
    files = make_class_folders(root / "in", 3, 5)
    (root / "in" / "n01440764" / "notes.txt").write_text("")
    broken = sorted(files)[3]
    (root / "in" / broken).write_bytes(files.pop(broken)[:-40])
    return root, files


def test_the_pack_command_names_the_source_shows_a_bar_and_sums_up(packed: tuple[Path, dict[str, bytes]]) -> None:
    root, _ = packed
    command = [sys.executable, "-m", "shards", "pack", "--source", root / "in", "--output", root / "shards"]
    ended = subprocess.run(
        [*command, "--rows_per_shard", "4", "--seed", "3", "--workers", "2"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = ended.stdout.splitlines()
    assert lines[0] == f"{root / 'in'}: class folders (3 classes)"
    assert lines[1:3] == ["Plan: 15 images of 3 classes, n01440764 (5) to n01440838 (5).", "Passed over: *.txt (1)."]
    assert lines[3].startswith(f"{root / 'shards'}: 14 images of 3 classes in 4 shards, 0.1 MB, in ")
    assert lines[3].endswith("(1 quarantined, 14 kept byte for byte)")
    assert lines[4] == f"Left out, with reasons: {root / 'shards' / 'quarantine.jsonl'}"
    assert "packing: 100%" in ended.stderr and "quarantined=1" in ended.stderr
    assert "images/s" in ended.stderr


@pytest.fixture(scope="module")
def shards(packed: tuple[Path, dict[str, bytes]]) -> Path:
    folder = packed[0] / "by_fixture"
    assert main(["pack", "--source", str(packed[0] / "in"), "--output", str(folder), "--workers", "1"]) == 0
    return folder


def test_verify_exits_0_on_a_whole_folder_and_1_with_each_fault_in_a_line(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(shards), "--decode", "1", "--workers", "1"]) == 0
    assert capsys.readouterr().out == f"{shards}: 14 rows in 1 shards, 0.1 MB: whole.\n"
    tar = shards / "shard-000000.tar"
    content = tar.read_bytes()
    place = int(load_index(shards).offset[6]) + 100
    tar.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert main(["verify", str(shards), "--workers", "1"]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("shard-000000.tar: row 6: its JPEG of ")
    assert "1 faults in 1 files. Copy these files again" in last
    tar.write_bytes(content)


def test_inspect_finds_a_row_by_number_key_and_name_and_writes_its_image(
    shards: Path, packed: tuple[Path, dict[str, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ShardFolder(shards)
    name, data = sorted(packed[1].items())[4]
    key = name.split("/")[1].removesuffix(".JPEG")
    row = find_row(folder, name)
    assert find_row(folder, key) == find_row(folder, str(row)) == row
    for wanted in (str(row), key, name):
        image = tmp_path / "x.jpg"
        assert main(["inspect", str(shards), wanted, "--output", str(image)]) == 0
        assert image.read_bytes() == data
        image.unlink()
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"row {row}: {key}"
        about = json.loads(lines[1].removeprefix("description: "))
        assert (about["name"], about["wnid"]) == (name, name.split("/")[0])
        assert lines[-1] == f"image: {image}"
    for wanted, message in (("14", "Give one of 0 to 13"), ("n0_1", "neither a key nor an original name")):
        assert main(["inspect", str(shards), wanted]) == 2
        assert message in capsys.readouterr().err


def test_inspect_without_a_row_sums_the_folder_up(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(shards)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{shards}: 14 rows, 3 classes, 1 shards of 2048, seed 0"
    assert lines[2] == "images: 1 quarantined, 14 kept byte for byte"


def test_a_contact_sheet_shows_each_row_in_its_cell(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    assert main(["inspect", str(shards), "2", "--sheet", str(sheet), "--number", "9"]) == 0
    assert capsys.readouterr().out == f"{sheet}: rows 2 to 10\n"
    pixels = np.asarray(Image.open(sheet)).astype(int)
    assert pixels.shape == (3 * 174, 3 * 160, 3)
    folder = ShardFolder(shards)
    for cell in range(9):
        row, (top, left) = 2 + cell, (cell // 3 * 174, cell % 3 * 160)
        height, width = int(folder.index.height[row]), int(folder.index.width[row])
        (tmp_path / "x.jpg").write_bytes(folder.jpeg(row))
        image = np.asarray(Image.open(tmp_path / "x.jpg"))
        y, x = top + (160 - height) // 2, left + (160 - width) // 2
        np.testing.assert_array_equal(pixels[y : y + height, x : x + width], image)
    assert main(["inspect", str(shards), "--sheet", str(tmp_path / "sheet.doc")]) == 2
    assert "no image format for '.doc'" in capsys.readouterr().err


def test_what_the_readme_says_of_your_own_images_works(
    tmp_path: Path, make_class_folders: Callable[[Path, int, int], dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    section = (ROOT / "README.md").read_text().partition("### Your own images")[2].partition("###")[0]
    commands = re.findall(r"make shards DATA=(\S+) SHARDS=(\S+)(?:\s+ARGS=\"([^\"]*)\")?", section)
    monkeypatch.chdir(tmp_path)
    files = make_class_folders(Path("photos/train"), 3, 2)
    shutil.copytree("photos/train/n01440801", "photos/val/n01440801")
    listed = [f"{name},{number % 2}\n" for number, name in enumerate(files)]
    Path("photos/list.csv").write_text("file,label\n" + "".join(listed))
    packed = {}
    for data, output, flags in commands:
        assert main(["pack", "--source", data, "--output", output, "--workers", "1", *flags.split()]) == 0
        packed[output] = (load_manifest(output).num_classes, sorted(load_index(output).label.tolist()))
    assert packed == {
        "shards/train": (3, [0, 0, 1, 1, 2, 2]),
        "shards/all": (0, [-1] * 8),
        "shards/listed": (2, [0] * 4 + [1] * 4),
        "shards/val": (3, [1, 1]),
    }


def test_flags_are_taken_with_hyphens_and_underscores_and_unknown_ones_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["pack", "--source", "a", "--output", "b", "--rows", "4"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --rows 4" in capsys.readouterr().err
