"""Finds the models of a probe by name: a run's student, its teacher, random weights, timm's or an export."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from common.errors import UserError
from distill.checkpoint import load_student
from distill.config import TeacherConfig, TrainConfig, load_config
from distill.evaluation.features import FeatureModel
from distill.export import student_detail
from distill.models import create_student
from distill.teacher import LOCAL_DIR, FrozenTeacher, load_teacher
from pipeline.batch import normalise

KINDS = "run, run:FOLDER, teacher, random, timm:NAME, timm:NAME@WEIGHTS or export:FOLDER"


@dataclass(frozen=True)
class ProbedModel:
    """A model of the probe's table.

    Attributes:
        name: what the table calls it: "student", "teacher", "random", or the source itself.
        source: as it was asked for.
        detail: which weights these are, in a few words.
        entry: the model in eval mode on the device, and its normalisation.
        embed_dim: width of its tokens.
        num_parameters: of the backbone.
    """

    name: str
    source: str
    detail: str
    entry: FeatureModel
    embed_dim: int
    num_parameters: int


@dataclass(frozen=True)
class SourceContext:
    """What a source may refer to.

    Attributes:
        run_dir: folder of the run; None where no run was given.
        config: its configuration; None likewise.
        img_size: side of the evaluated crops in pixels.
        device: where models go.
        seed: of random weights.
        use_ema: take the EMA of a run's student.
    """

    run_dir: Path | None
    config: TrainConfig | None
    img_size: int
    device: torch.device
    seed: int = 0
    use_ema: bool = True

    def run(self, source: str) -> tuple[Path, TrainConfig]:
        """The run that `source` needs; UserError where none was given."""
        if self.run_dir is None or self.config is None:
            raise UserError(
                f"model {source!r}: it belongs to a run, and none was given. Add --run FOLDER, or leave it "
                "out of --models."
            )
        return self.run_dir, self.config


def read_run(run_dir: str | Path) -> TrainConfig:
    """Read the configuration that a training run saved in its folder."""
    return load_config(Path(run_dir))


def load_source(source: str, context: SourceContext) -> ProbedModel:
    """Load one model of the probe.

    Args:
        source: `run` or `run:FOLDER` (student of a run), `teacher` (of the run), `random` (the run's student
            architecture with weights drawn from the seed), `timm:NAME` or `timm:NAME@WEIGHTS` (timm's own
            weights or a local file), `export:FOLDER` (an exported student).
        context: the run, image size, device and seed.

    Raises:
        UserError: unknown kind, an image size that the patch size does not divide, or what the loader raises.
    """
    kind, _, rest = source.partition(":")
    loaders: dict[str, Callable[[str, str, SourceContext], ProbedModel]] = {
        "run": _load_run,
        "teacher": _load_run_teacher,
        "random": _load_random,
        "timm": _load_timm,
        "export": _load_export,
    }
    takes_argument = {"run": bool(rest) or source == "run", "timm": bool(rest), "export": bool(rest)}
    if kind not in loaders or not takes_argument.get(kind, source == kind):
        raise UserError(f"model {source!r}: not a model source. Give one of {KINDS}.")
    model = loaders[kind](source, rest, context)
    patch = int(model.entry.model.patch_embed.patch_size[0])  # type: ignore[union-attr, index]
    if context.img_size % patch:
        raise UserError(
            f"model {source!r}: its patches are {patch} px, and the crops of {context.img_size} px do not divide "
            f"into them. Pass an --img_size that is a multiple of {patch}."
        )
    return model


def _load_run(source: str, folder: str, context: SourceContext) -> ProbedModel:
    run_dir = Path(folder) if folder else context.run(source)[0]
    model, meta = load_student(run_dir, use_ema=context.use_ema)
    detail = student_detail(meta["step"], meta["ema"])
    return _student(model, source, "student" if source == "run" else source, detail, context)


def _load_random(source: str, _: str, context: SourceContext) -> ProbedModel:
    config = context.run(source)[1]
    model = create_student(config.student, seed=context.seed)
    return _student(model, source, "random", f"initialisation of seed {context.seed}", context)


def _student(model: nn.Module, source: str, name: str, detail: str, context: SourceContext) -> ProbedModel:
    return ProbedModel(
        name=name,
        source=source,
        detail=detail,
        entry=FeatureModel(model.to(context.device).eval().requires_grad_(False), normalise),
        embed_dim=int(model.embed_dim),  # type: ignore[arg-type]
        num_parameters=count_parameters(model),
    )


def _load_run_teacher(source: str, _: str, context: SourceContext) -> ProbedModel:
    config = context.run(source)[1]
    return _frozen(config.teacher, source, "teacher", config.teacher.teacher_arch, context)


def _load_timm(source: str, rest: str, context: SourceContext) -> ProbedModel:
    arch, _, weights = rest.partition("@")
    config = replace(TeacherConfig(), teacher_arch=arch, teacher_pretrained_weights=weights or None)
    return _frozen(config, source, source, weights or "timm's weights", context)


def _load_export(source: str, folder: str, context: SourceContext) -> ProbedModel:
    config = replace(TeacherConfig(), teacher_arch=f"{LOCAL_DIR}{folder}", teacher_pretrained_weights=None)
    return _frozen(config, source, source, "exported weights", context)


def _frozen(config: TeacherConfig, source: str, name: str, detail: str, context: SourceContext) -> ProbedModel:
    # fp32 weights for every model of the table: the compute dtype is the probe's own, by autocast.
    teacher: FrozenTeacher = load_teacher(config, img_size=context.img_size, device=context.device, dtype=torch.float32)
    return ProbedModel(
        name=name,
        source=source,
        detail=detail,
        entry=FeatureModel(teacher.model, partial(normalise, mean=teacher.mean, std=teacher.std)),
        embed_dim=teacher.embed_dim,
        num_parameters=count_parameters(teacher.model),
    )


def count_parameters(model: nn.Module) -> int:
    """Number of parameters of a model."""
    return sum(math.prod(parameter.shape) for parameter in model.parameters())
