"""Students of other kinds than DINOv3's ViTs, and every preset, through training, resume, probe and export."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import probe
from cache_tools.__main__ import main as cache_tools
from distill.checkpoint import load_newest
from distill.config import PRESETS, LossConfig
from distill.export import ExportArgs, export_run
from distill.step import TERMS

from .conftest import CROPS, Workplace
from .test_training import assert_same_state, curve

Run = Callable[[list[str]], list[dict[str, Any]]]
VIT = ("--arch", "vit_tiny_patch16_224", "--patch_size", 16, "--local_crops_size", 32, "--mask_patch_size", 16)
CNN = ("--patch_size", 32, "--global_crops_size", 64, "--local_crops_size", 32, "--mask_patch_size", 32)
# Layers of another size than the family's are asked for where the architecture takes them.
STUDENTS = {
    "a ViT with absolute positions": (*VIT, "--embed_dim", 48, "--depth", 2, "--num_heads", 2, "--layer_scale", 0.5),
    "ConvNeXt": ("--arch", "convnext_atto", *CNN),
    "a CNN with batch norm": ("--arch", "resnet10t", *CNN),
}
OF_THE_FAMILY = ("--embed_dim", "--depth", "--num_heads", "--layer_scale")


def flags_for(workplace: Workplace, run: Path, *more: object) -> list[str]:
    """Return the flags of a run whose student may be a CNN, which takes no width, depth and heads."""
    words = workplace.flags(run, *more)
    if "vit" in words[words.index("--arch") + 1] if "--arch" in words else True:
        return words
    for name in OF_THE_FAMILY:
        at = words.index(name)
        del words[at : at + 2]
    return words


@pytest.mark.parametrize("kind", STUDENTS)
def test_any_timm_model_learns_resumes_to_the_bit_and_is_probed_and_exported(
    workplace: Workplace, run_here: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    flags = (*STUDENTS[kind], "--max_steps", 8, "--checkpoint_every", 4, "--val_data_path", workplace.val_shards)
    lines = run_here(flags_for(workplace, tmp_path / "run", *flags))
    said = capsys.readouterr().err
    assert "one pass for each crop size, since this student cannot be packed" in said
    assert "patch tokens resampled to the student's" in said
    assert curve(lines)[-1] < curve(lines)[0]
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for path in (tmp_path / "again" / "checkpoints").glob("step_000000008*"):
        path.unlink()
    run_here(flags_for(workplace, tmp_path / "again", *flags))
    assert_same_state(tmp_path / "run", tmp_path / "again")

    folder = export_run(ExportArgs(run=str(tmp_path / "run")))
    options = probe.ProbeConfig(
        run=str(tmp_path / "run"), models=("run", f"export:{folder}"), knn_k=(5,), layers=(1,), backend="cpu",
        device="cpu", feature_batch_size=16, pca_images=1, img_size=64,
    )  # fmt: skip
    student, exported = probe.probe(options).models
    assert 0 < student.knn[5] <= 100
    assert (student.knn, student.linear, student.rankme) == (exported.knn, exported.linear, exported.rankme)


def test_compiling_first_leaves_a_cnns_statistics_as_they_were(
    workplace: Workplace, run_here: Run, tmp_path: Path
) -> None:
    flags = (*STUDENTS["a CNN with batch norm"], "--max_steps", 2)
    run_here(flags_for(workplace, tmp_path / "eager", *flags))
    compiled = [word for word in flags_for(workplace, tmp_path / "traced", *flags) if word != "--no_compile"]
    run_here([*compiled, "--compile", "--compile_backend", "eager"])
    assert_same_state(tmp_path / "eager", tmp_path / "traced")


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"five"}))
def test_every_preset_trains_its_own_terms_live(
    workplace: Workplace, run_here: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    words = workplace.flags(tmp_path, "--max_steps", 24, "--preset", name)
    if name == "proteus":  # its own crops, not the small run's
        for flag, length in (("--local_crops_number", 2), ("--global_crops_scale", 3)):
            at = words.index(flag)
            del words[at : at + length]
    lines = run_here(words)
    # Those it adds to the five or raises; a term that it turns down need not fall within so few steps.
    own = {term: PRESETS[name].get(f"{term}_loss_weight", 0.0) for term in TERMS}
    asked = {term for term, weight in own.items() if weight and weight >= getattr(LossConfig(), f"{term}_loss_weight")}
    off = {term for term in TERMS if PRESETS[name].get(f"{term}_loss_weight") == 0}
    assert asked
    falling = {term: [line[term] for line in lines] for term in asked}
    assert all(sum(values[-6:]) < sum(values[:6]) for values in falling.values()), falling
    assert all(math.isfinite(lines[-1][term]) for term, weight in own.items() if weight)
    assert not any(lines[-1].get(term) for term in off)
    reads_local = name in ("recommended", "five_plus_patch", "gram_like", "proteus")  # proteus asks for none
    assert ("no local crops, which no loss reads" in capsys.readouterr().err) == (not reads_local)
    _, state = load_newest(tmp_path)  # type: ignore[misc]
    prototypes = state["model"]["cls_bank.weight"].shape[0]
    assert prototypes == (32 if name in ("recommended", "five_plus_patch", "gram_like") else 0)


def test_one_global_crop_teaches_alike_live_and_cached(workplace: Workplace, run_here: Run, tmp_path: Path) -> None:
    teacher = ("--teacher_arch", f"local-dir:{workplace.teacher}")
    crops = (*CROPS, "--global_crops_number", 1)
    build = ["build", "--shards", workplace.shards, "--cache", tmp_path / "cache", "--view_sets", 2, "--device", "cpu"]
    assert cache_tools([str(word) for word in [*build, "--codec", "fp16", *teacher, *crops]]) == 0
    flags = (*teacher, "--global_crops_number", 1, "--max_steps", 4, "--view_sets", 2)
    live = run_here(workplace.flags(tmp_path / "live", *flags))
    cached = run_here(workplace.flags(tmp_path / "cached", *flags, "--cache_path", tmp_path / "cache"))
    # fp16 rounds tokens by 2^-11 of their size; prototypes are fitted to the rounded ones.
    assert curve(cached) == pytest.approx(curve(live), rel=2.0**-7)
