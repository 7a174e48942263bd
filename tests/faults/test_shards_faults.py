"""What can go wrong around packing: each is a clear error, and nothing half-written is accepted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import simplejpeg

from common.errors import UserError
from shards.__main__ import main
from shards.manifest import WORK_FOLDER, load_manifest
from shards.pack import pack
from shards.sources import SourceOptions
from shards.workers import only_packer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    rng = np.random.default_rng(0)
    for number in range(30):
        folder = root / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        (folder / f"{number:05d}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels))
    return root


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def run(source: Path, output: Path, **options: Any) -> Any:
    return pack(source, output, **({"rows_per_shard": 4, "workers": 1, "progress": False} | options))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int, error: BaseException) -> None:
    """Make packing fail when it comes to that shard."""
    import shards.pack as packing

    real = packing.finish_shard

    def limited(job: Any) -> Any:
        if job.number == shards:
            raise error
        return real(job)

    monkeypatch.setattr(packing, "finish_shard", limited)


def assert_unfinished_then_whole(source: Path, output: Path, tmp_path: Path) -> None:
    """No reader accepts the folder now; the same command completes it to an unbroken run's."""
    with pytest.raises(UserError, match=r"packing is not finished. Run the same pack command again"):
        load_manifest(output)
    run(source, output)
    run(source, tmp_path / "unbroken")
    assert folder_bytes(output) == folder_bytes(tmp_path / "unbroken")


@pytest.mark.parametrize("write", [3, 20, 33])
def test_a_full_disk_names_the_place_and_the_same_command_continues(
    source: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    writes = 0
    real = os.fsync

    def full(descriptor: int) -> None:
        nonlocal writes
        writes += 1
        if writes == write:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"the disk is full .*Make room and run the same command again"):
        run(source, output)
    monkeypatch.undo()
    assert not list(output.rglob("*.tmp-*"))
    assert_unfinished_then_whole(source, output, tmp_path)


def test_a_disk_that_is_really_full_is_named(
    source: Path, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(256 << 10)
    if not disk.is_mount():
        pytest.skip("mounting a small file system is not permitted here")
    big = simplejpeg.encode_jpeg(np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8))
    for number in range(4):
        (source / "class0" / f"big{number}.jpg").write_bytes(big)
    with pytest.raises(UserError, match=r"about 1.2 MB are needed, 0.[23] MB are free there. Make room"):
        run(source, disk / "out")
    monkeypatch.setattr("shards.pack._Run._check_free_disk", lambda *_: None)
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"the disk is full \(0 MB free\)"):
            run(source, disk / "out", workers=workers)
    with pytest.raises(UserError, match="packing is not finished"):
        load_manifest(disk / "out")


def test_a_disk_too_small_is_refused_before_packing(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr("shards.pack.shutil.disk_usage", lambda _: Usage(1000))
    with pytest.raises(UserError, match=r"about 0.2 MB are needed, 0.0 MB are free there"):
        run(source, output)
    assert not list(output.glob("*.tar"))


def test_an_unreadable_file_stops_packing_unless_it_is_to_be_skipped(
    source: Path, output: Path, tmp_path: Path
) -> None:
    (source / "class0" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"gone.jpg: cannot be read \(No such file.*--skip-unreadable"):
            run(source, output, workers=workers)
    manifest = run(source, output, skip_unreadable=True)
    assert manifest.counts == {"quarantined": 1, "verbatim": 30}
    (line,) = (output / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "unreadable: No such file or directory"


@pytest.mark.parametrize("change", ["size", "mtime", "removed"])
def test_a_source_that_changes_while_it_is_packed_is_named(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    import shards.pack as packing

    changed = source / "class1" / "00001.jpg"
    real = packing.run_jobs

    def listed_then_changed(*arguments: Any, **options: Any) -> Any:
        if change == "size":
            changed.write_bytes(changed.read_bytes() + b"x")
        elif change == "mtime":
            os.utime(changed, (1, 1))
        else:
            changed.unlink()
        return real(*arguments, **options)

    monkeypatch.setattr(packing, "run_jobs", listed_then_changed)
    expected = "cannot be read" if change == "removed" else "changed while it was packed"
    with pytest.raises(UserError, match=f"00001.jpg: {expected}"):
        run(source, output)


def test_a_tar_that_changes_while_it_is_packed_is_named(
    source: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shards.pack as packing

    tar = tmp_path / "all.tar"
    subprocess.run(["tar", "cf", tar, "-C", source, "class0", "class1"], check=True)
    real = packing.run_jobs

    def listed_then_touched(*arguments: Any, **options: Any) -> Any:
        os.utime(tar, (1, 1))
        return real(*arguments, **options)

    monkeypatch.setattr(packing, "run_jobs", listed_then_touched)
    with pytest.raises(UserError, match=r"all.tar: changed while it was packed"):
        run(tar, output)
    assert not list(output.glob("*.tar"))


@pytest.mark.parametrize("change", ["added", "edited", "removed"])
def test_a_source_that_changed_between_two_runs_is_refused_and_what_changed_is_named(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    stop_after(monkeypatch, 3, UserError("stopped"))
    with pytest.raises(UserError, match="stopped"):
        run(source, output)
    monkeypatch.undo()
    path = source / "class0" / "00008.jpg"
    if change == "added":
        (source / "class0" / "00007b.jpg").write_bytes(path.read_bytes())
    elif change == "edited":
        path.write_bytes(path.read_bytes() + b"x")
    else:
        path.unlink()
    what = "00007b.jpg was added" if change == "added" else "00008.jpg"
    with pytest.raises(UserError, match=f"changed since this packing began: class0/{what}"):
        run(source, output)


def test_a_packing_begun_with_other_arguments_is_refused_with_both_values(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 2, UserError("stopped"))
    with pytest.raises(UserError, match="stopped"):
        run(source, output, seed=1)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"packing was begun with seed = 1, now it is 2. Give the same"):
        run(source, output, seed=2)
    with pytest.raises(UserError, match="packing was begun with class_names"):
        run(source, output, seed=1, options=SourceOptions(classes=("class1", "class0")))
    assert run(source, output, seed=1).num_rows == 30


def test_a_folder_that_is_not_ours_is_left_alone(source: Path, output: Path, tmp_path: Path) -> None:
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex, 1 in all\) and no shards"):
        run(source, output)
    assert folder_bytes(output) == {"thesis.tex": b"years of work"}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"is a file. Give a folder"):
        run(source, tmp_path / "file")
    with pytest.raises(UserError, match="lies inside the source"):
        run(source, source / "shards")
    with pytest.raises(UserError, match="no such file or folder"):
        run(tmp_path / "nothing", output)
    with pytest.raises(UserError, match="rows_per_shard is 0"):
        run(source, output, rows_per_shard=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="0 images found"):
        run(tmp_path / "empty", tmp_path / "out2")


def test_a_second_packer_on_one_output_is_refused_while_the_first_works(source: Path, output: Path) -> None:
    output.mkdir()
    with only_packer(output / WORK_FOLDER), pytest.raises(UserError) as refused:
        run(source, output)
    assert "another packer is at work there" in str(refused.value)
    assert run(source, output).num_rows == 30


def test_a_packer_waits_for_the_workers_of_a_killed_one(source: Path, output: Path) -> None:
    (output / WORK_FOLDER).mkdir(parents=True)
    orphan = "import sys, time; from pathlib import Path; from shards.workers import hold_as_worker\n"
    orphan += "with hold_as_worker(Path(sys.argv[1])): print('held', flush=True); input(); print('ended', flush=True)"
    command = [sys.executable, "-c", orphan, output / WORK_FOLDER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "held\n"
        packing = threading.Thread(target=run, args=(source, output))
        packing.start()
        time.sleep(0.3)
        assert not list(output.glob("*.tar"))
        process.stdin.write("\n")
        process.stdin.flush()
        packing.join()
    assert load_manifest(output).num_rows == 30


def test_a_worker_that_dies_stops_packing_with_a_clear_error(
    source: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shards.workers as workers

    real = workers._report_finished

    def kill_and_report(pending: Any, report: Any) -> Any:
        for child in workers.multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)
        return real(pending, report)

    monkeypatch.setattr(workers, "_report_finished", kill_and_report)
    for number in range(400):  # enough that the workers are still at it
        path = source / "class0" / f"more{number}.jpg"
        path.write_bytes((source / "class0" / "00000.jpg").read_bytes())
    with pytest.raises(UserError, match=r"a worker process died .*Run the same command again"):
        run(source, output, workers=2)
    monkeypatch.undo()
    assert_unfinished_then_whole(source, output, tmp_path)


def test_commands_print_the_error_alone_and_exit_with_2(
    source: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", "--source", str(source / "no"), "--output", str(output)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {source / 'no'}: no such file or folder.")
    assert "Traceback" not in printed.err
    assert main(["verify", str(output)]) == 2
    assert "no such folder. Pack images first" in capsys.readouterr().err


def test_an_interrupted_command_says_that_it_continues(source: Path, output: Path, tmp_path: Path) -> None:
    for number in range(3000):
        os.link(source / "class0" / "00000.jpg", source / "class0" / f"more{number:05d}.jpg")
    command = [sys.executable, "-m", "shards", "pack", "--source", source, "--output", output]
    command += ["--rows-per-shard", "16", "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    while process.poll() is None and not list(output.glob("*.tar")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors.decode()
    assert errors.decode().rstrip().endswith("the same command continues from here.")
    assert "Traceback" not in errors.decode()
    with pytest.raises(UserError, match="packing is not finished"):
        load_manifest(output)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interrupted_verification_ends_in_a_line(source: Path, output: Path, workers: str) -> None:
    large = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    (source / "class0" / "00000.jpg").write_bytes(simplejpeg.encode_jpeg(large))
    for number in range(400):  # seconds of decoding
        os.link(source / "class0" / "00000.jpg", source / "class0" / f"more{number:05d}.jpg")
    run(source, output)
    command = [sys.executable, "-m", "shards", "verify", output, "--decode", "1", "--workers", workers]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stderr is not None
        begun = b""
        while begun.count(b"\r") < 2:  # the bar is drawn, and once more
            begun += process.stderr.read(1)
        os.killpg(process.pid, signal.SIGINT)
        errors = (begun + process.stderr.read()).decode()
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("Interrupted. ")
    assert "Traceback" not in errors


def test_what_is_left_out_is_listed_without_paths_of_this_machine(source: Path, tmp_path: Path) -> None:
    manifests = []
    for place in ("one", "two"):
        shutil.copytree(source, tmp_path / place / "in")
        (tmp_path / place / "in/class0/gone.jpg").symlink_to(tmp_path / place / "nowhere")
        (tmp_path / place / "in/class0/00000.jpg").write_bytes(b"<html>")
        manifests.append(run(tmp_path / place / "in", tmp_path / place / "out", skip_unreadable=True))
        assert str(tmp_path) not in (tmp_path / place / "out/quarantine.jsonl").read_text()
    assert manifests[0].fingerprint() == manifests[1].fingerprint()
