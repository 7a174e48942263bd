"""The command line, its defaults, and the run folder's config.json."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch

from common.errors import UserError
from distill.config import DataConfig, LossConfig, TrainConfig, load_config, preset, write_or_check_config
from distill.runtime import compiles, parse_config, step_seed, versions
from pipeline.augmentation import CropOptions, named_augmentation

DOCUMENTED_DEFAULTS = {
    "arch": "vit_small", "patch_size": 16, "teacher_arch": "vit_large_patch16_dinov3.lvd1689m",
    "teacher_pretrained_weights": None, "cache_path": None, "epochs": 100.0, "lr": 5e-4, "batch_size_per_gpu": 64,
    "dino_loss_weight": 1.0, "ibot_loss_weight": 1.0, "koleo_loss_weight": 0.1, "spd_loss_weight": 1.0,
    "cls_loss_weight": 1.0, "global_crops_scale": None, "global_crops_size": 224,
    "local_crops_scale": None, "local_crops_number": 8, "local_crops_size": 96, "mask_patch_size": 32,
    "mask_ratio": 0.4, "data_path": "", "output_dir": "runs/default",
}  # fmt: skip


def flat(config: TrainConfig) -> dict[str, object]:
    groups = [getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "preset"]
    return {f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group)}


def test_every_documented_flag_has_its_documented_default() -> None:
    values = flat(parse_config([]))
    assert {name: values[name] for name in DOCUMENTED_DEFAULTS} == DOCUMENTED_DEFAULTS
    crops = TrainConfig().crops()  # None is the preset's own
    assert (crops.global_crops_scale, crops.local_crops_scale) == ((0.4, 1.0), (0.05, 0.4))


def test_no_flag_name_stands_in_two_groups() -> None:
    config = TrainConfig()
    names = [
        f.name
        for group in dataclasses.fields(config)
        if group.name != "preset"
        for f in dataclasses.fields(getattr(config, group.name))
    ]
    assert sorted(names) == sorted(set(names))


def test_flags_take_underscores_and_hyphens() -> None:
    assert parse_config(["--dino_loss_weight", "2"]).losses.dino_loss_weight == 2.0
    assert parse_config(["--dino-loss-weight", "2"]).losses.dino_loss_weight == 2.0
    assert parse_config(["--global_crops_scale", "0.3", "1"]).data.global_crops_scale == (0.3, 1.0)


def test_compiling_is_left_to_the_device_unless_a_flag_asks_for_it_or_not() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    expected = {
        (): (False, True), ("--check_compile",): (True, True), ("--compile",): (True, True),
        ("--no_compile",): (False, False), ("--no-compile", "--seed", "1"): (False, False),
        ("--compile", "False"): (False, False), ("--compile=True",): (True, True),
        ("--compile", "--lr", "1"): (True, True),
    }  # fmt: skip
    for flags, answers in expected.items():
        config = parse_config(flags).runtime
        assert (compiles(config, cpu), compiles(config, gpu)) == answers, flags


def test_an_unknown_flag_fails_with_the_closest_match(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(["--dino_los_weight", "2"])
    assert stop.value.code == 2
    assert "--dino_loss_weight" in capsys.readouterr().err.replace("-loss-", "_loss_").replace("-weight", "_weight")


def test_a_preset_sets_the_weights_and_single_flags_go_over_it() -> None:
    config = parse_config(["--preset=gram_like", "--koleo_loss_weight", "0"])
    assert (config.losses.gram_loss_weight, config.losses.spd_loss_weight) == (2.0, 0.0)
    assert config.losses.koleo_loss_weight == 0.0
    with pytest.raises(UserError, match=r"Did you mean 'gram_like'.*There are: five, recommended, five_plus_patch"):
        preset("gram")


def test_a_preset_sets_crops_too_and_what_no_loss_reads_is_neither_cut_nor_fitted() -> None:
    assert parse_config(["--preset", "proteus"]) == preset("proteus")
    crops = parse_config(["--preset", "proteus", "--global_crops_scale", "0.5", "1"]).crops()
    assert (crops.num_global_crops, crops.num_local_crops, crops.global_crops_scale) == (1, 0, (0.5, 1.0))
    assert (crops.jitter_prob, crops.gray_prob) == (0, 0)
    assert (crops.blur_prob_global, crops.solarize_prob_global) == ((0,), (0,))
    unread = parse_config(["--preset", "lightly_like", "--local_crops_number", "8"])
    assert (unread.crops().num_local_crops, unread.crops().num_global_crops) == (0, 2)
    assert (unread.fitted_prototypes().num_prototypes, unread.fitted_prototypes().prototype_rows) == (0, 8192)
    five = TrainConfig()
    assert (five.crops().num_local_crops, five.fitted_prototypes()) == (8, five.prototypes)


def test_one_view_is_no_pair_for_dino_and_three_global_crops_are_refused() -> None:
    one = DataConfig(global_crops_number=1, local_crops_number=0)
    with pytest.raises(UserError, match="DINO compares two views, and there is one"):
        TrainConfig(data=one)
    assert TrainConfig(data=one, losses=LossConfig(dino_same_view=True)).crops().num_crops == 1
    with pytest.raises(UserError, match="--global_crops_number 3: it must be 1 or 2"):
        parse_config(["--global_crops_number", "3"]).crops()


def test_config_json_comes_back_equal(tmp_path: Path) -> None:
    config = parse_config(["--preset", "lightly_like", "--lr", "1e-3", "--global_crops_scale", "0.3", "1"])
    write_or_check_config(config, tmp_path)
    assert load_config(tmp_path) == config


def test_unknown_fields_in_config_json_are_named() -> None:
    with pytest.raises(UserError, match=r"unknown fields \['momentum'\]"):
        TrainConfig.from_json('{"optim": {"momentum": 1}}')


def test_a_run_resumes_only_with_the_settings_that_decide_what_it_computes(tmp_path: Path) -> None:
    write_or_check_config(TrainConfig(), tmp_path)
    moved = parse_config(["--output_dir", "elsewhere", "--num_threads", "9", "--no_compile", "--data_path", "moved"])
    other = parse_config(["--beta2", "0.99", "--mask_ratio", "0.5"])
    write_or_check_config(other, tmp_path)  # nothing is there yet that could be resumed
    write_or_check_config(TrainConfig(), tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_000000004.json").write_text("{}")
    write_or_check_config(moved, tmp_path)
    with pytest.raises(UserError) as error:
        write_or_check_config(other, tmp_path)
    assert "beta2: the run has 0.999, now 0.99" in str(error.value)
    assert "mask_ratio: the run has 0.4, now 0.5" in str(error.value)
    assert load_config(tmp_path) == moved
    longer = parse_config(["--lr", "1e-3", "--epochs", "200", "--accumulation_steps", "2"])
    write_or_check_config(longer, tmp_path)
    assert load_config(tmp_path) == longer


def test_other_versions_are_said_and_a_file_without_them_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = versions()
    assert (found["firn"], found["torch"], found["timm"]) == ("0.1.0", metadata.version("torch"), timm.__version__)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_000000004.json").write_text("{}")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(TrainConfig())))  # as it was before there were versions
    write_or_check_config(TrainConfig(), tmp_path, found)
    assert json.loads(path.read_text())["versions"] == found
    write_or_check_config(TrainConfig(), tmp_path, found)
    assert not caplog.messages
    write_or_check_config(TrainConfig(), tmp_path, found | {"torch": "2.0"})
    assert f"torch {found['torch']}, now 2.0" in caplog.text and "timm" not in caplog.text
    assert load_config(tmp_path) == TrainConfig()


def test_the_commit_is_named_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    (tmp_path / "distill").mkdir()
    (tmp_path / "pyproject.toml").write_bytes((root / "pyproject.toml").read_bytes())
    monkeypatch.setattr("distill.runtime.__file__", str(tmp_path / "distill" / "runtime.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "commit" not in versions.__wrapped__()
    for words in (["init", "-q"], ["add", "."], "-c user.name=a -c user.email=b commit -qm first".split()):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    head = subprocess.run(["git", "-C", tmp_path, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert versions.__wrapped__()["commit"] == head.stdout[:12]
    (tmp_path / "pyproject.toml").write_text((root / "pyproject.toml").read_text() + "\n")
    assert versions.__wrapped__()["commit"] == f"{head.stdout[:12]}-dirty"


def test_the_crop_plan_takes_its_sizes_from_the_run() -> None:
    config = TrainConfig(data=DataConfig(global_crops_size=128, local_crops_number=3, mask_ratio=0.3))
    crops = config.crops()
    assert (crops.global_crops_size, crops.num_local_crops, crops.mask_ratio, crops.patch_size) == (128, 3, 0.3, 16)


@pytest.mark.parametrize(
    ("name", "scales"),
    [("dino", ((0.4, 1.0), (0.05, 0.4))), ("dinov2_released", ((0.32, 1.0), (0.05, 0.32)))],
)
def test_a_preset_of_crops_keeps_its_own_scales_unless_a_flag_changes_them(name: str, scales: object) -> None:
    config = parse_config(["--augmentation", name])
    crops = config.crops()
    assert (crops.global_crops_scale, crops.local_crops_scale) == scales
    assert crops == named_augmentation(name)
    # A cache that is built with the same flag has the same crops.
    built = CropOptions(augmentation=name).teacher_crops()
    assert built.geometry_fingerprint() == crops.geometry_fingerprint()
    changed = parse_config(["--augmentation", name, "--global_crops_scale", "0.2", "0.9"]).crops()
    assert (changed.global_crops_scale, changed.local_crops_scale) == ((0.2, 0.9), scales[1])  # type: ignore[index]


def test_the_teacher_flag_and_the_cache_path_may_not_contradict_each_other() -> None:
    assert not parse_config([]).uses_cache()
    assert parse_config(["--cache_path", "c"]).uses_cache()
    assert not parse_config(["--cache_path", "c", "--teacher", "live"]).uses_cache()
    with pytest.raises(UserError, match="--teacher cache: no cache_path"):
        parse_config(["--teacher", "cache"]).uses_cache()


def test_step_seeds_differ_by_seed_step_and_rank() -> None:
    seeds = {step_seed(a, b, c) for a in range(5) for b in range(50) for c in range(8)}
    assert len(seeds) == 5 * 50 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--accumulation_steps", "3"], "--accumulation_steps 3: it must be a divisor of --batch_size_per_gpu 64"),
        (["--batch_size_per_gpu", "0"], "--batch_size_per_gpu 0: it must be 1 or more"),
        (["--max_steps", "0"], "--max_steps 0"),
        (["--epochs", "0"], "--epochs 0"),
        (["--lr", "-1"], "--lr -1.0: it must be a number above 0"),
        (["--min_lr", "nan"], "--min_lr nan: it must be a number of 0 or more"),
        (["--ema_momentum", "2"], "--ema_momentum 2.0: it must be at least 0 and below 1"),
        (["--spd_loss_weight", "-0.5"], "--spd_loss_weight -0.5: it must be a number of 0 or more"),
        (["--warmup_epochs", "inf"], "--warmup_epochs inf"),
        (["--log_every", "0"], "--log_every 0"),
        (["--keep_checkpoints", "0"], "--keep_checkpoints 0"),
        (["--num_prototypes", "1"], "--num_prototypes 1"),
        (["--target_top1_mass", "1"], "--target_top1_mass 1"),
    ],
)
def test_settings_out_of_their_range_are_named(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(flags)
    assert stop.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())  # the message stands in a box
    assert message in shown


@pytest.mark.parametrize(
    ("flag", "ours"),
    [("--learning_rate", "--lr"), ("--batch-size=64", "--batch_size_per_gpu"), ("--wd", "--weight_decay")],
)
def test_the_name_of_another_trainer_is_answered_with_ours(flag: str, ours: str) -> None:
    with pytest.raises(UserError, match=rf"there is no such flag. Did you mean {ours}\?"):
        parse_config([flag, "1"])
