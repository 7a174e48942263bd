"""What Firn advises holds: messages that name a flag, followed to the letter; commands and flags in documents."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import train
from common.locks import file_lock
from distill.checkpoint import list_checkpoints, load_newest
from distill.config import DEFAULT_TEACHER
from distill.models import create_backbone
from distill.prototypes import PROTOTYPES, load_prototypes
from distill.step import DistillStep
from shards.pack import pack

from .conftest import MAKE_ENV, ROOT, Workplace

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Run `train.py` with these arguments in this process; gives its exit status and what it printed."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}

    def run(flags: list[str]) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        status = train.main()
        return status, capsys.readouterr().err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(workplace: Workplace, command: Command, tmp_path: Path) -> Callable[..., str]:
    """Train on the cache in one folder and give what was printed; `fails` says whether it must fail."""

    def train_with(*flags: object, fails: bool = False) -> str:
        base = ("--cache_path", workplace.cache, "--max_steps", 3, "--checkpoint_every", 1)
        status, printed = command(workplace.flags(tmp_path / "run", *base, *flags))
        assert status == (2 if fails else 0), printed
        return printed

    return train_with


def last_step(folder: Path) -> int:
    return list_checkpoints(folder)[-1].step


def test_a_lower_learning_rate_after_a_step_that_is_not_finite(run: Callable[..., str], tmp_path: Path) -> None:
    flags = ("--warmup_epochs", 0, "--clip_grad", 0)
    assert "with a lower --lr" in run("--lr", 1e30, *flags, fails=True)
    # The first step was finite, but ruined the weights that were then saved.
    printed = run("--lr", 1e-3, *flags, fails=True)
    Path(re.search(r"remove (\S+) to resume", printed)[1]).unlink()  # type: ignore[index]
    run("--lr", 1e-3, *flags)
    assert last_step(tmp_path / "run") == 3


def test_a_small_set_has_fewer_prototypes_than_the_default(
    run: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("--num_prototypes", 16384, "--prototype_rows", 131072)
    assert "355 prototypes instead of 16384: there are 710 cls tokens to fit them to" in caplog.text
    assert load_prototypes(tmp_path / "run" / PROTOTYPES).cls.weight.shape == (355, 64)
    run("--num_prototypes", 16384, "--prototype_rows", 131072, "--max_steps", 4)  # resumes
    assert last_step(tmp_path / "run") == 4


@pytest.mark.parametrize("steps_before", [0, 2])
def test_every_way_out_of_a_full_gpu(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_before: int
) -> None:
    real, calls = DistillStep.forward, []

    def forward(self: DistillStep, *tensors: torch.Tensor) -> Any:
        calls.append(len(tensors[4]))
        if len(calls) > steps_before and calls[-1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, *tensors)

    monkeypatch.setattr(DistillStep, "forward", forward)
    printed = run(fails=True)
    ways = re.findall(r"(--accumulation_steps 2|--batch_size_per_gpu 8 --accumulation_steps 1)[, ]", printed)
    assert len(ways) == (1 if steps_before else 2)
    run(*ways[-1].split())
    assert last_step(tmp_path / "run") == 3
    assert set(calls[steps_before + 1 :]) == {8}


def test_a_run_is_made_longer_and_not_shorter_than_it_is(run: Callable[..., str], tmp_path: Path) -> None:
    run()
    printed = run("--max_steps", 2, fails=True)
    assert "--max_steps 2: 2 steps of" in printed and "3 are taken already" in printed
    run("--max_steps", int(re.search(r"Give --max_steps (\d+)", printed)[1]))  # type: ignore[index]
    assert "resumes at step 3" in run("--max_steps", 5)
    assert last_step(tmp_path / "run") == 5
    assert json.loads((tmp_path / "run" / "config.json").read_text())["optim"]["max_steps"] == 5


def test_a_length_of_no_step(workplace: Workplace, command: Command, tmp_path: Path) -> None:
    flags = ("--cache_path", workplace.cache)
    status, printed = command(workplace.flags(tmp_path / "run", *flags, "--epochs", 0.001))
    assert status == 2 and "--epochs 0.001: 0 steps" in printed
    advised = re.search(r"--max_steps \d+", printed)[0].split()  # type: ignore[index]
    assert command(workplace.flags(tmp_path / "run", *flags, *advised))[0] == 0


def test_micro_batches_in_which_koleo_finds_no_neighbour(run: Callable[..., str]) -> None:
    assert "KoLeo finds no neighbour" in run("--accumulation_steps", 16, fails=True)
    run("--accumulation_steps", 16, "--koleo_loss_weight", 0)


def test_local_weights_after_a_download_that_failed(
    workplace: Workplace, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = "vit_small_patch16_dinov3"
    flags = ("--max_steps", 1, "--teacher_arch", name, "--patch_size", 16, "--local_crops_size", 32)
    status, printed = command(workplace.flags(tmp_path / "run", *flags))
    assert status == 2 and "Give a local file with --teacher_pretrained_weights" in printed
    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    save_file(create_backbone(name).state_dict(), weights)
    status, printed = command(workplace.flags(tmp_path / "run", *flags, "--teacher_pretrained_weights", weights))
    assert status == 0, printed
    # The same file in another place is the same teacher.
    moved = weights.rename(tmp_path / "moved.safetensors")
    longer = (*flags, "--max_steps", 2, "--teacher_pretrained_weights", moved)
    assert command(workplace.flags(tmp_path / "run", *longer))[0] == 0

    tensors = load_file(moved)
    tensors["blocks.3.mlp.fc1.weight"][5, 7] = torch.nan
    save_file(tensors, moved)
    status, printed = command(workplace.flags(tmp_path / "run", *longer))
    assert status == 2 and f"{moved}: blocks.3.mlp.fc1.weight holds NaN or Inf" in printed


def test_validation_data_is_looked_at_before_the_training(
    workplace: Workplace, run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no such folder" in run("--val_data_path", tmp_path / "nowhere", fails=True)
    images = workplace.shards.parent / "images" / "val"
    unlabelled = tmp_path / "flat"
    unlabelled.mkdir()
    for i, path in enumerate(sorted(images.rglob("*.*"))[:4]):
        (unlabelled / f"{i}{path.suffix}").write_bytes(path.read_bytes())
    pack(unlabelled, tmp_path / "unlabelled", workers=1, progress=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    judged_by = ("--knn_every_epochs", 1, "--teacher_arch", DEFAULT_TEACHER)  # the default: as if none were named
    printed = run("--val_data_path", tmp_path / "unlabelled", *judged_by, fails=True)
    assert f"without labels the student is judged by its teacher, and {DEFAULT_TEACHER} cannot be that" in printed
    run("--val_data_path", tmp_path / "unlabelled", "--knn_every_epochs", 0)
    fewer = tmp_path / "fewer"
    for folder in sorted(images.iterdir())[1:]:
        (fewer / folder.name).mkdir(parents=True)
        for path in folder.iterdir():
            (fewer / folder.name / path.name).write_bytes(path.read_bytes())
    pack(fewer, tmp_path / "other", workers=1, progress=False)
    printed = run("--val_data_path", tmp_path / "other", fails=True)
    assert "its classes are not those of" in printed
    advised = re.search(r"Pack it again with --classes (\S+\.json)", printed)[1]  # type: ignore[index]
    command = [sys.executable, "-m", "shards", "pack", "--source", fewer, "--output", tmp_path / "again"]
    subprocess.run([*command, "--classes", advised], cwd=ROOT, check=True, capture_output=True)
    run("--val_data_path", tmp_path / "again")


def test_the_trained_weights_where_the_average_still_holds_the_initial_ones(
    workplace: Workplace, run: Callable[..., str], tmp_path: Path
) -> None:
    assert "of the initial weights" not in run("--ema_momentum", 0.001)
    (tmp_path / "run").rename(tmp_path / "another")
    # The momenta of three steps: 0.9, 0.95 and 1, by a cosine.
    printed = run("--ema_momentum", 0.9, "--val_data_path", workplace.val_shards)
    advised = re.findall(r"`python (.*?)`", printed.partition("The EMA still holds 86% of the initial weights")[2])
    assert len(advised) == 2
    fewer = "--models run --pca_images 0 --layers 1 --knn_k 10 --max_train_rows 64 --max_val_rows 64".split()
    for words, more in zip(advised, (fewer, []), strict=True):
        subprocess.run([sys.executable, *shlex.split(words), *more], cwd=ROOT, check=True, capture_output=True)
    assert json.loads((tmp_path / "run" / "probe" / "probe.json").read_text())["models"][0]["name"] == "student"
    trained = load_newest(tmp_path / "run")[1]["model"]  # type: ignore[index]
    for key, value in load_file(tmp_path / "run" / "export" / "model.safetensors").items():
        assert torch.equal(trained[f"student.{key}"], value), key


def test_a_run_goes_on_with_other_versions_and_one_text_log_tells_of_all_attempts(
    run: Callable[..., str], tmp_path: Path
) -> None:
    run()
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    first = config["versions"]["torch"]
    path.write_text(json.dumps(config | {"versions": config["versions"] | {"torch": "2.0"}}))
    assert f"torch {first}, timm" in run("--max_steps", 5)
    run("--max_steps", 4, fails=True)
    told = [line[20:] for line in (tmp_path / "run" / "train.log").read_text().splitlines()]
    assert sum(line.startswith("firn ") for line in told) == 2 and "done at step 3" in told and "done at step 5" in told
    assert [line.split()[1] for line in told if line.startswith("step ")] == ["1/3", "2/3", "3/3", "4/5", "5/5"]
    assert any(f"other versions, so its numbers may differ: ['torch 2.0, now {first}']" in line for line in told)
    assert told[-1].startswith("error: --max_steps 4: 4 steps of")


def test_a_second_run_in_one_folder_is_refused(run: Callable[..., str], tmp_path: Path) -> None:
    with file_lock(tmp_path / "run" / ".lock") as held:
        assert held
        assert "another run is at work there" in run(fails=True)
    run()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_ends_the_run_with_a_line(
    workplace: Workplace, command: Command, tmp_path: Path, number: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    # Prototypes of another number than those beside the cache are fitted: for hours, with so many iterations.
    flags = ("--cache_path", workplace.cache, "--max_steps", 1, "--num_prototypes", 24)
    words = workplace.flags(run_dir, *flags, "--prototype_iterations", 10**9)
    process = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (run_dir / "config.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, printed = process.communicate()
    assert process.returncode == 130, printed
    assert printed.rstrip().endswith("the same command continues from here.")
    assert "Traceback" not in printed
    assert command(workplace.flags(run_dir, *flags))[0] == 0


def test_a_run_begins_from_an_export_with_the_settings_of_a_file(
    workplace: Workplace, run: Callable[..., str], command: Command, tmp_path: Path
) -> None:
    run()
    subprocess.run(
        [sys.executable, "-m", "distill.export", "--run", tmp_path / "run", "--output", tmp_path / "export"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    config = ["--config", str(tmp_path / "run" / "config.json"), "--init", str(tmp_path / "export")]
    status, printed = command([*config, "--output_dir", str(tmp_path / "next"), "--max_steps", "1", "--lr", "1e-30"])
    assert status == 0, printed
    state = load_newest(tmp_path / "next")[1]["model"]  # type: ignore[index]
    exported = load_file(tmp_path / "export" / "model.safetensors")
    for key, value in exported.items():
        assert torch.equal(state[f"student.{key}"], value), key
    assert command(["--config", str(tmp_path / "none.json")])[0] == 2
    assert "the weights do not fit" in command([*config, "--output_dir", str(tmp_path / "deep"), "--depth", "3"])[1]


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACES = [f"{name}=/nowhere" for name in ("DATA", "SHARDS", "VAL", "CACHE", "RUN")]


def documented_commands() -> Iterator[str]:
    """Yield the commands of the documents that stand in a block or between backticks, `...` left out."""
    for document in DOCUMENTS:
        text = document.read_text().replace("\\\n", " ")
        blocks = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
        spans = re.findall(r"(?<!`)`(make [^`]+=[^`]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
        for line in [*blocks.splitlines(), *spans]:
            if re.match(r"make|python |\.venv/bin/python ", line):
                yield " ".join(line.partition("  #")[0].replace(" ...", " ").split())


@pytest.mark.parametrize("command", sorted(set(documented_commands())))
def test_a_command_in_a_document_is_one_that_its_program_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Parsed(BaseException):
        pass

    def then_stop(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parsed(*args: Any, **kwargs: Any) -> Any:
            parse(*args, **kwargs)
            raise Parsed

        return parsed

    if command.startswith("make"):
        words = ["make", "-n", f"PY={sys.executable}", *PLACES, *shlex.split(command)[1:]]
        made = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=MAKE_ENV)
        assert made.returncode == 0, made.stderr
        lines = [line for line in made.stdout.replace("\\\n", " ").splitlines() if line.startswith(sys.executable)]
        assert lines or command.split()[1:] in ([], ["setup"])
    else:
        lines = [command]
    monkeypatch.setattr(tyro, "cli", then_stop(tyro.cli))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", then_stop(argparse.ArgumentParser.parse_args))
    for line in lines:
        words = shlex.split(line)[1:]
        if "distill.launch" in words:  # what follows torchrun's own flags
            words = words[next(i for i in range(2, len(words)) if words[i] in ("train.py", "-m")) :]
        name, flags = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
        if name in ("-c", "ruff", "mypy", "pytest"):
            continue
        monkeypatch.setattr(sys, "argv", [name, *flags])
        package = (ROOT / name.replace(".", "/")).is_dir()
        program = importlib.import_module(f"{name}.__main__" if package else name.removesuffix(".py"))
        with pytest.raises(Parsed):
            program.main()
