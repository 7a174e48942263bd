"""Whole runs in one process: live and cached targets, resume, compilation, accumulation, errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import train
from cache_tools.__main__ import main as cache_tools
from cache_tools.read import TeacherCache
from common.errors import UserError
from distill.checkpoint import list_checkpoints, load_newest, load_student
from distill.evaluation.features import load_probed
from distill.export import Card, export_model
from distill.models import create_backbone, create_student
from distill.prototypes import load_prototypes
from distill.runtime import Ranks, parse_config
from distill.step import METRIC_NAMES, TERMS, DistillStep, StepInputs, StepScalars
from pipeline.loader import MultiCropLoader, open_loader
from shards.pack import pack
from shards.sources import SourceOptions

from .conftest import CROPS, ROOT, Workplace, read_lines

Run = Callable[[list[str]], list[dict[str, Any]]]
LOSSES = ("loss", "dino", "ibot", "koleo", "cls", "spd")
# The same fp32 sums in another order, through a few AdamW steps of size lr: measured 1e-6, two decades of room.
FLOAT_NOISE = 1e-4


def curve(lines: list[dict[str, Any]], name: str = "loss") -> list[float]:
    return [line[name] for line in lines if name in line]


def assert_same_state(first: Path, second: Path) -> None:
    """Assert that the newest checkpoints of two runs are equal to the bit."""

    def compare(a: object, b: object, where: str) -> None:
        assert type(a) is type(b), where
        if isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                compare(a[key], b[key], f"{where}.{key}")
        elif isinstance(a, list):
            assert len(a) == len(b), where
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                compare(x, y, f"{where}[{i}]")
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b), where
        else:
            assert a == b, where

    (step_a, state_a), (step_b, state_b) = load_newest(first), load_newest(second)
    assert step_a == step_b
    compare(state_a, state_b, "state")


def test_live_and_cached_targets_give_losses_within_the_codecs_bound(
    workplace: Workplace, run_here: Run, tmp_path: Path
) -> None:
    """The bound: |live - cached| <= sum over target elements of |d loss / d target| times the codec's own bound.

    It holds to first order at equal weights. Along two runs the errors average out far below it, while the
    weights drift apart by them, so it is asserted for every step of both runs.
    """
    steps = 6
    cached = run_here(workplace.flags(tmp_path / "cached", "--cache_path", workplace.cache, "--max_steps", steps))
    live = run_here(
        workplace.flags(
            tmp_path / "live", "--cache_path", workplace.cache, "--teacher", "live", "--max_steps", steps
        )
    )
    config = parse_config(workplace.flags(tmp_path / "cached", "--cache_path", workplace.cache))
    prototypes = load_prototypes(tmp_path / "cached" / "prototypes.safetensors")
    step = DistillStep(
        create_student(config.student, seed=0), prototypes, config.student, config.losses, student_temp=0.1,
        global_crops_size=48, local_crops_size=24, autocast=False,
    )  # fmt: skip
    temps = prototypes.cls.calibrated_temp.new_tensor(config.prototypes.teacher_temp_start)
    with (
        TeacherCache.open(workplace.cache) as cache,
        open_loader(
            workplace.shards, device="cpu", global_batch_size=16, seed=0, augmentation=config.crops(),
            view_sets=2, teacher_crops=False,
        ) as loader,
    ):  # fmt: skip
        batch = next(iter(loader))
        targets, bound = cache.fetch(batch, device="cpu"), cache.bound(batch)
        inputs = StepInputs.of(batch, targets)
        inputs = inputs._replace(
            teacher_cls=inputs.teacher_cls.clone().requires_grad_(),
            teacher_patches=inputs.teacher_patches.clone().requires_grad_(),
        )
        loss, _ = step(*inputs, *StepScalars(temps, temps, torch.zeros(())))
        grads = torch.autograd.grad(loss, [inputs.teacher_cls, inputs.teacher_patches], allow_unused=True)
    allowed = sum(
        (g.abs() * limit).sum().item() for g, limit in zip(grads, (bound.cls, bound.patches), strict=True)
    )
    assert 0 < allowed < 0.1 * loss.item()
    differences = [abs(a - b) for a, b in zip(curve(live), curve(cached), strict=True)]
    assert len(differences) == steps
    assert 0 < max(differences) <= allowed


def test_a_run_resumed_at_any_step_ends_with_the_same_state_to_the_bit(
    workplace: Workplace, run_here: Run, tmp_path: Path
) -> None:
    flags = ("--cache_path", workplace.cache, "--checkpoint_every", 3, "--drop_path_rate", 0.2)
    whole = run_here(workplace.flags(tmp_path / "whole", *flags, "--max_steps", 26))
    # 22 steps an epoch: the second part crosses into the second view set.
    broken = workplace.flags(tmp_path / "broken", *flags, "--max_steps", 26)

    class Stop(Exception):
        pass

    def stop_at_11(self: object, step: int) -> bool:
        if step == 11:
            raise Stop
        return step % 1 == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.metrics.MetricsLog.due", stop_at_11)
        with pytest.raises(Stop):
            run_here(broken)
    assert load_newest(tmp_path / "broken")[0] == 9
    resumed = run_here(broken)
    assert_same_state(tmp_path / "whole", tmp_path / "broken")
    assert curve(resumed) == curve(whole)
    assert [line["step"] for line in resumed] == list(range(1, 27))


def start(flags: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "train.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    lines = run / "metrics.jsonl"
    while not lines.exists() or len(lines.read_text().splitlines()) < step:
        assert process.poll() is None, f"step {step} was not reached"
        time.sleep(0.005)


def test_a_run_killed_with_sigkill_and_one_ended_by_sigterm_end_as_the_unbroken_run(
    workplace: Workplace, run_here: Run, tmp_path: Path
) -> None:
    last = 150  # far behind the step at which the signals come, however late they come
    flags = ("--cache_path", workplace.cache, "--checkpoint_every", 4, "--max_steps", last)
    run_here(workplace.flags(tmp_path / "whole", *flags))
    broken = workplace.flags(tmp_path / "broken", *flags)

    killed = start(broken)
    wait_for_step(killed, tmp_path / "broken", 9)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    killed.stdout.close()
    kept = load_newest(tmp_path / "broken")[0]
    assert kept % 4 == 0

    ended = start(broken)
    wait_for_step(ended, tmp_path / "broken", kept + 2)
    ended.send_signal(signal.SIGTERM)
    output, _ = ended.communicate()
    assert ended.returncode == 0, output
    stopped_at = load_newest(tmp_path / "broken")[0]
    assert kept < stopped_at < last
    assert f"stopped by SIGTERM at step {stopped_at}" in output
    run_here(broken)
    assert_same_state(tmp_path / "whole", tmp_path / "broken")


def test_the_compiled_run_follows_the_eager_run(
    workplace: Workplace, run_here: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eager = run_here(workplace.flags(tmp_path / "eager", "--cache_path", workplace.cache, "--max_steps", 3))
    assert "compiling before" not in capsys.readouterr().err
    compiled = run_here(
        workplace.flags(
            tmp_path / "compiled", "--cache_path", workplace.cache, "--max_steps", 3, "--compile",
            "--compile_backend", "aot_eager", "--check_compile",
        )
    )  # fmt: skip
    assert curve(compiled) == pytest.approx(curve(eager), rel=FLOAT_NOISE)
    said = [line.split()[0] for line in capsys.readouterr().err.splitlines()]
    assert said.index("compiling") + 1 == said.index("compiled") == said.index("step") - 1


@pytest.mark.parametrize("teacher", ["cache", "live"])
def test_a_process_compiles_a_run_of_another_batch_size_after_the_first(
    workplace: Workplace, run_here: Run, tmp_path: Path, teacher: str
) -> None:
    source = ("--cache_path", workplace.cache) if teacher == "cache" else ()
    for batch in (32, 48):  # neither divides the 355 images whose tokens fit the prototypes
        flags = (*source, "--max_steps", 1, "--batch_size_per_gpu", batch)
        run_here(workplace.flags(tmp_path / str(batch), *flags, "--compile", "--compile_backend", "eager"))


def test_the_first_batch_and_the_compiler_are_start_up(
    workplace: Workplace, run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The clock leaps by eleven days, once while the loader starts and once while the compiler works.
    leap, real, read = 1e6, time.perf_counter, MultiCropLoader.__next__
    leaps: list[str] = []
    monkeypatch.setattr(time, "perf_counter", lambda: real() + leap * len(leaps))

    def starting(self: MultiCropLoader) -> Any:
        batch = read(self)
        leaps.extend([] if leaps else ["loader"])
        return batch

    def compile_now(*_: object) -> None:
        leaps.append("compiler")

    monkeypatch.setattr(MultiCropLoader, "__next__", starting)
    monkeypatch.setattr(train, "compiles", lambda *_: True)
    monkeypatch.setattr(train, "compile_now", compile_now)
    lines = run_here(workplace.flags(tmp_path / "run", "--cache_path", workplace.cache, "--max_steps", 2))
    assert leaps == ["loader", "compiler"]
    assert max(curve(lines, "step_time")) < leap / 2


class Syncs(TorchDispatchMode):
    """Counts the operators that wait for a GPU: a value read on the host, or a shape that depends on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        chosen = args[1] if name in ("index", "index_put") else []
        if name in self.WAITING or any(i is not None and i.dtype == torch.bool for i in chosen):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("source", ["cache", "live"])
def test_a_step_between_two_lines_of_the_log_waits_for_no_device(
    workplace: Workplace, run_here: Run, tmp_path: Path, source: str
) -> None:
    flags = ("--teacher_temp", "calibrated", "--accumulation_steps", 2, "--log_every", 99, "--drop_path_rate", 0.2)
    flags += ("--cache_path", workplace.cache, "--teacher", source)
    counts = []
    for steps in (1, 2, 5):  # the first one leaves prototypes beside the cache
        with Syncs() as syncs:
            run_here(workplace.flags(tmp_path / str(steps), *flags, "--max_steps", steps))
        counts.append(syncs.counts)
    assert counts[1] == counts[2]
    assert counts[1].total() > 0  # those of the start: the temperatures, read once


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch(
    workplace: Workplace, run_here: Run, tmp_path: Path
) -> None:
    # Without KoLeo, whose nearest neighbours are those of the micro-batch, every term is a mean over images.
    flags = ("--cache_path", workplace.cache, "--max_steps", 4, "--koleo_loss_weight", 0)
    once = run_here(workplace.flags(tmp_path / "once", *flags))
    split = run_here(workplace.flags(tmp_path / "split", *flags, "--accumulation_steps", 4))
    assert curve(split) == pytest.approx(curve(once), rel=FLOAT_NOISE)
    assert curve(split, "grad_norm") == pytest.approx(curve(once, "grad_norm"), rel=10 * FLOAT_NOISE)


def test_a_teacher_named_beside_a_cache_is_the_cache_s_whatever_it_is_called(
    workplace: Workplace, run_here: Run, tmp_path: Path
) -> None:
    def flags(*teacher: object, steps: int) -> list[str]:
        words = workplace.flags(tmp_path / "run", "--cache_path", workplace.cache, "--max_steps", steps)
        at = words.index("--teacher_arch")
        return [*words[:at], *words[at + 2 :], *map(str, teacher)]

    renamed, other = tmp_path / "renamed", tmp_path / "other"
    shutil.copytree(workplace.teacher, renamed)
    shutil.copytree(workplace.teacher, other)
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"norm.bias": weights["norm.bias"] + 1e-3}, other / "model.safetensors")
    with pytest.raises(UserError, match=r"--teacher_arch local-dir:\S*other: that is vit_small\S* with other weights"):
        run_here(flags("--teacher_arch", f"local-dir:{other}", steps=1))
    with pytest.raises(UserError, match=r"that is vit_small_patch16_dinov3.lvd1689m, and the cache is of vit_small"):
        run_here(flags("--teacher_arch", "vit_small", steps=1))
    with pytest.raises(UserError, match=r"could not be found .* --teacher_arch may be left out"):
        run_here(flags("--teacher_arch", f"local-dir:{tmp_path / 'gone'}", steps=1))
    run_here(flags(steps=1))
    asked = {"run": str(tmp_path / "run"), "img_size": 48, "device": torch.device("cpu")}
    with pytest.raises(UserError, match=r"learned from a cache of vit_small\S* \(of no release\), weights sha256"):
        load_probed("teacher", **asked)  # type: ignore[arg-type]
    run_here(flags("--teacher_arch", f"local-dir:{renamed}", steps=2))
    assert load_probed("teacher", **asked).detail == f"local-dir:{renamed}"  # type: ignore[arg-type]
    save_file(load_file(other / "model.safetensors"), renamed / "model.safetensors")
    with pytest.raises(UserError, match="with other weights"):
        load_probed("teacher", **asked)  # type: ignore[arg-type]
    shutil.copy(workplace.teacher / "model.safetensors", renamed)
    assert len(run_here(flags("--teacher_arch", f"local-dir:{workplace.teacher}", steps=3))) == 3


def test_view_sets_are_chosen_kept_at_a_resume_and_not_held_up_by_one_that_is_being_built(
    workplace: Workplace, run_here: Run, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"

    def build(number: int) -> None:
        teacher = ["--teacher_arch", f"local-dir:{workplace.teacher}", "--device", "cpu", *CROPS]
        words = ["build", "--shards", workplace.shards, "--cache", cache, "--view_sets", number, *teacher]
        assert cache_tools([str(word) for word in words]) == 0

    def run(name: str, *flags: object) -> list[float]:
        lines = run_here(workplace.flags(tmp_path / name, "--cache_path", cache, "--max_steps", 44, *flags))
        return curve(lines)

    build(1)
    one = run("one")
    build(2)
    two = run("two")
    assert two[:22] == one[:22] and two[22:] != one[22:]  # the second epoch sees the second view set
    assert run("chosen", "--view_sets", 1) == one
    # A run that began with one goes on with it, at the end of its first epoch too.
    run("begun", "--view_sets", 1, "--checkpoint_every", 22)
    for record in (tmp_path / "begun" / "checkpoints").glob("step_000000044.*"):
        record.unlink()
    config = json.loads((tmp_path / "begun" / "config.json").read_text())
    config["teacher"]["view_sets"] = None  # as if it had not been said
    (tmp_path / "begun" / "config.json").write_text(json.dumps(config))
    assert run("begun") == one
    # A build under way.
    next((cache / "commit" / "v1").glob("*.json")).unlink()
    assert run("while it is built") == one
    with pytest.raises(UserError, match=r"view set 1 lacks 1 of 3 shards"):
        run("wanted", "--view_sets", 2)


@pytest.mark.parametrize("source", ["--cache_path", "live"])
def test_without_labels_the_student_is_judged_by_its_teacher(
    workplace: Workplace, run_here: Run, tmp_path: Path, source: str
) -> None:
    images = workplace.shards.parent / "images" / "val"
    pack(images, tmp_path / "val", workers=1, progress=False, options=SourceOptions(labels="none"))
    flags = ["--teacher_arch", f"local-dir:{workplace.teacher}", "--max_steps", 44, "--knn_every_epochs", 1]
    flags += [source, workplace.cache] if source == "--cache_path" else ["--teacher", "live"]
    lines = run_here(workplace.flags(tmp_path / "run", *flags, "--val_data_path", tmp_path / "val"))
    judged = [line for line in lines if "rankme" in line]
    assert [line["step"] for line in judged] == [22, 44]
    assert not any("knn_top1" in line for line in lines)
    for line in judged:  # the teacher is small and random: a linear map of what any such student sees gives its tokens
        assert 1 < line["rankme"] < 64
        assert min(line["cosine"], line["patch_cosine"]) > 0.95
        assert 25 < line["neighbours"] < 100  # by chance, 3 %: 10 of 352


def test_the_student_learns_and_every_term_is_logged(workplace: Workplace, run_here: Run, tmp_path: Path) -> None:
    lines = run_here(
        workplace.flags(
            tmp_path / "run", "--cache_path", workplace.cache, "--max_steps", 44, "--val_data_path",
            workplace.val_shards, "--knn_every_epochs", 1, "--term_gradients_every", 22, "--teacher_temp", "calibrated",
        )
    )  # fmt: skip
    steps = [line for line in lines if "loss" in line]
    expected = {"grad_norm", "lr", "epoch", "images_per_second", "data_wait", "step_time"}
    assert {*METRIC_NAMES, *expected} <= set(steps[0])
    for name in ("dino_kl", "ibot_kl", "cls", "spd"):
        first, last = sum(curve(steps, name)[:4]), sum(curve(steps, name)[-4:])
        assert last < 0.95 * first, name
    assert [line["step"] for line in lines if "knn_top1" in line] == [22, 44]
    norms = [line for line in lines if "grad_norm_spd" in line]
    assert [line["step"] for line in norms] == [22, 44]
    assert all(norms[0][f"grad_norm_{t}"] > 0 for t in TERMS[:5])
    model, meta = load_student(tmp_path / "run")
    assert meta["step"] == 44
    assert torch.isfinite(model.norm.weight).all()
    assert [c.step for c in list_checkpoints(tmp_path / "run")] == [44]


def test_prototypes_of_a_cached_run_are_shared_by_the_next_run(
    workplace: Workplace, run_here: Run, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        run_here(workplace.flags(tmp_path / name, "--cache_path", workplace.cache, "--max_steps", 1))
    beside = (workplace.cache / "prototypes.safetensors").read_bytes()
    assert (tmp_path / "one" / "prototypes.safetensors").read_bytes() == beside
    assert (tmp_path / "two" / "prototypes.safetensors").read_bytes() == beside
    run_here(
        workplace.flags(
            tmp_path / "three", "--cache_path", workplace.cache, "--max_steps", 1, "--num_prototypes", 16
        )
    )
    assert load_prototypes(tmp_path / "three" / "prototypes.safetensors").cls.weight.shape[0] == 16
    assert (workplace.cache / "prototypes.safetensors").read_bytes() == beside


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--global_crops_scale", "0.3", "1.0"], "global_crops_scale"),
        (["--data_seed", "1"], "seed"),
        (["--view_sets", "3"], r"has view sets \[0, 1\], not \[2\]. Build with a larger --view_sets"),
    ],
)
def test_a_cache_of_other_crops_is_refused_before_training(
    workplace: Workplace, tmp_path: Path, flags: list[str], message: str
) -> None:
    config = parse_config(workplace.flags(tmp_path / "run", "--cache_path", workplace.cache, *flags))
    with pytest.raises(UserError, match=message):
        train.train(config, Ranks(0, 1, torch.device("cpu")))


@pytest.mark.parametrize(
    ("ours", "theirs", "advice"),
    [("dali-cuda-engine", "dali-cuda", "Leave --hw_decoder out"), ("dali-cuda", "dali-cuda-engine", "Give --hw_decod")],
)
def test_a_cache_of_the_other_decoder_of_a_gpu_is_refused(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: str, theirs: str, advice: str
) -> None:
    opened = TeacherCache.open(workplace.cache)
    opened.fingerprint["decoder"] = theirs
    monkeypatch.setattr(TeacherCache, "open", lambda *_, **__: opened)
    monkeypatch.setattr(train, "decoder_name", lambda *_, **__: ours)
    config = parse_config(workplace.flags(tmp_path / "run", "--cache_path", workplace.cache))
    with opened, pytest.raises(UserError, match=f"decoded by {theirs}, this run decodes by {ours}.*{advice}"):
        train.open_cache(config, None, Ranks(0, 1, torch.device("cpu")))


def test_a_cache_of_another_backend_is_taken_with_a_word(
    workplace: Workplace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for backend in ("dali", "cpu"):
        config = parse_config(workplace.flags(tmp_path, "--cache_path", workplace.cache, "--backend", backend))
        train.open_cache(config, None, Ranks(0, 1, torch.device("cpu"))).close()
    said = [record.getMessage() for record in caplog.records if record.name == "train"]
    mixed = "the teacher saw crops of dali-cpu, the student sees those of cpu-cpu: nearly equal"
    assert said == [f"{workplace.cache}: {mixed}"]


def test_a_run_that_is_not_finite_stops_with_a_replay_file_and_no_bad_weight(
    workplace: Workplace, tmp_path: Path
) -> None:
    flags = workplace.flags(
        tmp_path / "run", "--cache_path", workplace.cache, "--max_steps", 9, "--lr", 1e30, "--warmup_epochs", 0,
        "--clip_grad", 0, "--checkpoint_every", 1,
    )  # fmt: skip
    process = start(flags)
    output, _ = process.communicate()
    assert process.returncode == 2, output
    assert "loss or gradient is not finite" in output
    assert len(list((tmp_path / "run" / "replay").iterdir())) == 1
    assert "Traceback" not in output


def test_the_command_line_says_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "train.py", "--output_dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        check=False, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2
    expected = "error: --data_path: missing. Give the folder of shards, as in --data_path shards/train."
    assert done.stderr.strip().endswith(expected)


def test_lines_of_a_run_are_readable_while_it_runs(workplace: Workplace, run_here: Run, tmp_path: Path) -> None:
    lines = run_here(workplace.flags(tmp_path / "run", "--cache_path", workplace.cache, "--max_steps", 2))
    assert read_lines(tmp_path / "run") == lines
    assert all(abs(sum(line[t] * w for t, w in _weights(line).items()) - line["loss"]) < 1e-4 for line in lines)


def _weights(line: dict[str, Any]) -> dict[str, float]:
    """Default weights, with KoLeo's warm-up over 4 steps."""
    return {"dino": 1, "ibot": 1, "koleo": 0.1 * (line["step"] - 1) / 4, "cls": 1, "spd": 1}


def test_running_out_of_gpu_memory_names_the_batch_to_try(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "train", exhausted)
    monkeypatch.setattr(sys, "argv", ["train.py", *workplace.flags(tmp_path, "--batch_size_per_gpu", 16)])
    assert train.main() == 2
    printed = capsys.readouterr().err
    assert "Try --accumulation_steps 2, which keeps the global batch, or --batch_size_per_gpu 8 " in printed


def test_a_teacher_of_another_patch_size_teaches_alike_live_and_cached(
    workplace: Workplace, run_here: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    args = {"embed_dim": 64, "depth": 2, "num_heads": 2, "init_values": 0.5, "img_size": 42}
    model = create_backbone("vit_small_patch14_reg4_dinov2", model_args=args).eval()
    card = Card(
        name="teacher", student_arch="dinov2", teacher_arch="random", licence="MIT", step=0, ema=False, img_size=42,
        probe=None,
    )  # fmt: skip
    export_model(model, tmp_path / "teacher", card=card)
    arch = ("--teacher_arch", f"local-dir:{tmp_path / 'teacher'}")
    build = ["build", "--shards", workplace.shards, "--cache", tmp_path / "cache", "--view_sets", 2, "--device", "cpu"]
    assert cache_tools([str(word) for word in [*build, "--codec", "fp16", *arch, *CROPS]]) == 0
    flags = (*arch, "--max_steps", 4, "--view_sets", 2)
    capsys.readouterr()
    live = run_here(workplace.flags(tmp_path / "live", *flags))
    cached = run_here(workplace.flags(tmp_path / "cached", *flags, "--cache_path", tmp_path / "cache"))
    said = "its 3 x 3 patch tokens resampled to the student's 6 x 6"
    assert capsys.readouterr().err.count(said) == 2
    # fp16 rounds tokens by 2^-11 of their size; prototypes are fitted to the rounded ones.
    assert curve(cached) == pytest.approx(curve(live), rel=2.0**-7)
