"""Checkpoints: written whole or not at all, chosen by hash, kept by rule."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from distill.checkpoint import CheckpointWriter, list_checkpoints, load_newest, load_student
from distill.config import RuntimeConfig, StudentConfig, TrainConfig, write_or_check_config
from distill.optim import StudentEma
from distill.step import DistillStep

SmallDisk = Callable[[int], Path]


def state(value: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((3,), value)}, "ema": None, "loader": {"epoch": 1, "seed": 0}}


def write(run: Path, steps: list[int], *, keep_last: int = 10, keep_every: int = 0) -> None:
    writer = CheckpointWriter(run, RuntimeConfig(keep_checkpoints=keep_last, keep_every=keep_every))
    for step in steps:
        writer.save(step, state(step))
    writer.wait()


def test_the_newest_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None
    write(tmp_path, [5, 10])
    step, loaded = load_newest(tmp_path)
    assert step == 10
    assert torch.equal(loaded["model"]["w"], torch.full((3,), 10.0))
    assert loaded["loader"] == {"epoch": 1, "seed": 0}


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, RuntimeConfig(keep_checkpoints=2, keep_every=0))
    live = state(1.0)
    writer.save(1, live)
    live["model"]["w"].fill_(2.0)
    writer.wait()
    assert load_newest(tmp_path)[1]["model"]["w"][0] == 1.0


def test_last_ones_and_every_nth_are_kept(tmp_path: Path) -> None:
    write(tmp_path, [10, 20, 30, 40, 50, 60], keep_last=2, keep_every=20)
    assert [c.step for c in list_checkpoints(tmp_path)] == [20, 40, 50, 60]
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("*.pt")) == [
        f"step_{s:09d}.pt" for s in (20, 40, 50, 60)
    ]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "unrecorded"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, [1, 2])
    newest = tmp_path / "checkpoints" / "step_000000002.pt"
    content = bytearray(newest.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
        newest.write_bytes(content)
    elif damage == "cut":
        newest.write_bytes(content[:-1])
    elif damage == "remove":
        newest.unlink()
    else:
        newest.with_suffix(".json").unlink()
    with caplog.at_level(logging.WARNING):
        step, _ = load_newest(tmp_path)
    assert step == 1
    assert (str(newest) in caplog.text) == (damage != "unrecorded")


def test_no_intact_checkpoint_is_an_error_not_a_new_start(tmp_path: Path) -> None:
    write(tmp_path, [1])
    (tmp_path / "checkpoints" / "step_000000001.pt").write_bytes(b"")
    with pytest.raises(UserError, match="none of 1 checkpoints is intact"):
        load_newest(tmp_path)


def test_a_disk_that_is_really_full_fails_the_run_and_keeps_earlier_checkpoints(small_disk: SmallDisk) -> None:
    run = small_disk(100_000) / "run"
    write(run, [1])
    writer = CheckpointWriter(run, RuntimeConfig(keep_checkpoints=1, keep_every=0))
    writer.save(2, {"model": {"w": torch.zeros(50_000)}})
    writer.save(3, state(3.0))  # after a failure nothing is written
    assert writer.failed
    with pytest.raises(UserError, match=r"a checkpoint could not be written .*step_000000002\.pt.* Earlier .* intact"):
        writer.wait()
    assert load_newest(run)[0] == 1
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000000001.json", "step_000000001.pt"]


def test_any_failure_of_the_writing_thread_fails_the_run(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, RuntimeConfig())
    writer.save(1, {"model": {"w": lambda: "not to be pickled"}})
    with pytest.raises(UserError, match=r"a checkpoint could not be written .*pickle"):
        writer.wait()


@pytest.mark.parametrize("use_ema", [True, False])
def test_the_student_of_a_run_is_its_ema_or_its_weights(
    tmp_path: Path, make_step: Callable[..., DistillStep], student_config: StudentConfig, use_ema: bool
) -> None:
    step = make_step()
    ema = StudentEma(step.student)
    with torch.no_grad():
        step.student.norm.bias.add_(1.0)
    config = TrainConfig(student=student_config)
    write_or_check_config(config, tmp_path)
    writer = CheckpointWriter(tmp_path, RuntimeConfig(keep_checkpoints=1, keep_every=0))
    writer.save(7, {"model": step.state_dict(), "ema": ema.model.state_dict(), "loader": {}})
    writer.wait()
    model, meta = load_student(tmp_path, use_ema=use_ema)
    assert meta == {"step": 7, "config": config, "ema": use_ema}
    source = ema.model if use_ema else step.student
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    assert not model.training


def test_a_folder_that_is_no_run_and_a_run_without_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_student(tmp_path)
    write_or_check_config(TrainConfig(), tmp_path)
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_student(tmp_path)


def test_a_checkpoints_record_states_its_step_and_size(tmp_path: Path) -> None:
    write(tmp_path, [1])
    record = json.loads((tmp_path / "checkpoints" / "step_000000001.json").read_text())
    assert record["step"] == 1
    assert record["bytes"] == (tmp_path / "checkpoints" / "step_000000001.pt").stat().st_size
