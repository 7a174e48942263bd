"""Packing that is killed at any moment and run again ends with the folder of an unbroken run, byte for byte."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

from common.errors import UserError
from shards.manifest import load_manifest
from shards.pack import pack
from shards.verify import verify
from tests.faults.forks import FORKS

NUM_KILLS = 20
CRASHED = 77


def make_images(root: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    for number in range(count):
        folder = root / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        data = b"<html>" if number % 11 == 5 else simplejpeg.encode_jpeg(pixels, colorsubsampling="420")
        (folder / f"{number:05d}.jpg").write_bytes(data)
    return root


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start_packing(source: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "shards", "pack", "--source", source, "--output", output]
    command += ["--rows-per-shard", "8", "--workers", "2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def test_twenty_kills_at_random_times_leave_the_folder_of_an_unbroken_run(tmp_path: Path) -> None:
    source = make_images(tmp_path / "in", 900)
    pack(source, tmp_path / "unbroken", rows_per_shard=8, workers=1, progress=False)
    expected = folder_bytes(tmp_path / "unbroken")
    draw = random.Random(1)
    kills = round_number = most_kept = 0
    while kills < NUM_KILLS:
        output = tmp_path / f"round{round_number}"
        round_number += 1
        while True:
            process = start_packing(source, output)
            wait_for_shards(process, output, draw.randrange(12))
            time.sleep(draw.uniform(0.0, 0.02))
            if kills < NUM_KILLS and process.poll() is None:
                kills += 1
                # In turn the packer alone, whose workers must end by themselves, and the whole group.
                (os.kill if kills % 2 else os.killpg)(process.pid, signal.SIGKILL)
                process.communicate()
                if (output / "manifest.json").exists():
                    assert verify(output, workers=1, progress=False)[:-1] == []
                else:
                    with pytest.raises(UserError, match=r"packing is not finished|no such folder"):
                        load_manifest(output)
                most_kept = max(most_kept, len(list(output.glob("*.tar"))))
                continue
            _, errors = process.communicate()
            assert process.returncode == 0, errors.decode()
            break
        assert folder_bytes(output) == expected
    assert most_kept > 5  # kills fell in the midst of the work, not only before it


def wait_for_shards(process: subprocess.Popen[bytes], output: Path, number: int) -> None:
    """Wait until a run has written so many shards more, or has ended: kills fall by progress, not by the clock."""
    before = len(list(output.glob("*.tar")))
    while process.poll() is None and len(list(output.glob("*.tar"))) < before + number:
        time.sleep(0.002)


def test_a_crash_before_any_change_of_a_file_leaves_the_folder_of_an_unbroken_run(tmp_path: Path) -> None:
    """In turn before each opening for writing, renaming and removal that packing does below its output."""
    source = make_images(tmp_path / "in", 12)
    pack(source, tmp_path / "unbroken", rows_per_shard=5, workers=1, progress=False)
    expected = folder_bytes(tmp_path / "unbroken")
    point = 0
    while True:
        output = tmp_path / f"crash{point}"
        if run_in_child(source, output, crash_at=point) == 0:
            break
        if not (output / "manifest.json").exists():
            with pytest.raises(UserError, match=r"packing is not finished|holds no manifest|no such folder"):
                load_manifest(output)
        # A second crash on the way of recovering, then the end.
        run_in_child(source, output, crash_at=3 + point % 7)
        assert run_in_child(source, output, crash_at=None) == 0, point
        assert folder_bytes(output) == expected, point
        point += 1
    # Eleven files are opened and renamed, as many and more are made for the work and removed: fewer points would
    # mean that changes are no longer seen.
    assert point > 40


def run_in_child(source: Path, output: Path, crash_at: int | None) -> int:
    """Pack in a process that dies, without any clean-up, before its change number `crash_at`; return its status."""
    child = FORKS.Process(target=crash_packing, args=(source, output, crash_at))
    child.start()
    child.join()
    assert child.exitcode in (0, CRASHED)
    return child.exitcode


def crash_packing(source: Path, output: Path, crash_at: int | None) -> None:
    seen = 0

    def count_changes(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            mode = arguments[2]
            counts = isinstance(mode, int) and bool(mode & (os.O_WRONLY | os.O_RDWR))
        else:
            counts = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
        # Removals of whole folders name their files relative to the folder.
        if counts and (str(output) in str(arguments[0]) or event in ("os.remove", "os.rmdir")):
            if seen == crash_at:
                os._exit(CRASHED)
            seen += 1

    sys.addaudithook(count_changes)
    pack(source, output, rows_per_shard=5, workers=1, progress=False)


def test_a_kept_shard_that_was_damaged_meanwhile_is_packed_again(tmp_path: Path) -> None:
    source = make_images(tmp_path / "in", 60)
    pack(source, tmp_path / "unbroken", rows_per_shard=5, workers=1, progress=False)
    output = tmp_path / "out"
    run_in_child(source, output, crash_at=60)
    kept = sorted(output.glob("*.tar"))
    assert len(kept) >= 3
    damaged = kept[0].read_bytes()
    kept[0].write_bytes(damaged[:700] + b"?" + damaged[701:])
    kept[1].write_bytes(damaged[:1024])
    kept[2].unlink()
    pack(source, output, rows_per_shard=5, workers=1, progress=False)
    assert folder_bytes(output) == folder_bytes(tmp_path / "unbroken")
