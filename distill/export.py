"""Exports a run's student: a folder that timm loads by name, with hubconf.py, a model card and optional ONNX.

python -m distill.export --run RUN [--output FOLDER] [--onnx]
"""

from __future__ import annotations

if __name__ == "__main__":
    from common.interrupt import end_at_interrupt

    end_at_interrupt()

import copy
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import save
from timm.models._hub import save_config_for_hf
from torch import nn

from common.errors import UserError, run_command
from common.files import explain_disk_errors, file_sha256, sync_folder
from distill.checkpoint import load_student
from distill.config import DEFAULT_TEACHER, TeacherConfig, TrainConfig
from distill.models import has_cls_token, timm_name
from distill.onnx import require_onnx, write_onnx
from distill.prototypes import PROTOTYPES, load_prototypes
from distill.weights import stated_origin
from pipeline.batch import IMAGENET_MEAN, IMAGENET_STD

OF_NO_RELEASE = "(of no release)"
WEIGHTS, CONFIG, HUBCONF, CARD, SUMS = "model.safetensors", "config.json", "hubconf.py", "README.md", "SHA256SUMS"
ONNX = "model.onnx"
# What the training code needs and a user of the weights does not.
TRAINING_ARGS = ("drop_path_rate", "pretrained", "pretrained_cfg")

_HUBCONF = '''"""torch.hub entry point: torch.hub.load(FOLDER, "student", source="local")."""

from pathlib import Path

import timm

dependencies = ["torch", "timm"]


def student(pretrained=True, **kwargs):
    """The distilled model; README.md says what its forward_features gives."""
    return timm.create_model(f"local-dir:{Path(__file__).resolve().parent}", pretrained=pretrained, **kwargs)
'''


@dataclass(frozen=True)
class ExportArgs:
    """Options of the export."""

    run: str
    """Folder of a training run (its --output_dir)."""
    output: str | None = None
    """Folder to write; RUN/export by default. An earlier export there is replaced."""
    ema: bool = True
    """Export the EMA of the student where the run keeps one; --no_ema exports the trained weights."""
    onnx: bool = False
    """Also write model.onnx (needs the onnx and onnxscript packages)."""
    licence: str | None = None
    """Licence to state in the model card, where that of the teacher's weights is not known or not the one found."""


def export_run(args: ExportArgs) -> Path:
    """Export the student of a run's newest valid checkpoint; returns the folder.

    Raises:
        UserError: no run, no checkpoint, a folder in the way, or onnx is asked for and missing.
    """
    if args.onnx:
        require_onnx()
    run_dir = Path(args.run)
    model, meta = load_student(run_dir, use_ema=args.ema)
    config: TrainConfig = meta["config"]
    teacher = teacher_of_run(config.teacher, cached_teacher(run_dir, config.teacher))
    weights = teacher.teacher_pretrained_weights
    output = Path(args.output) if args.output else run_dir / "export"
    probe_json = run_dir / "probe" / "probe.json"
    card = Card(
        name=output.resolve().parent.name if output.name == "export" else output.name,
        student_arch=config.student.arch,
        teacher_arch=teacher.teacher_arch,
        licence=args.licence or teacher_licence(teacher.teacher_arch, weights),
        own_weights=Path(weights).name if weights and not args.licence else None,
        step=meta["step"],
        ema=meta["ema"],
        img_size=config.data.global_crops_size,
        probe=json.loads(probe_json.read_text()) if probe_json.is_file() else None,
    )
    return export_model(model, output, card=card, onnx=args.onnx)


def teacher_of_run(stated: TeacherConfig, cached: Mapping[str, Any] | None) -> TeacherConfig:
    """The teacher that a run states; from a cache, whose teacher no flag need name, the one that the cache states."""
    if cached is None or stated.teacher_arch != DEFAULT_TEACHER or cached["architecture"] == DEFAULT_TEACHER:
        return stated
    name = cached["architecture"]
    return TeacherConfig(teacher_arch=name if "." in name else f"{name} {OF_NO_RELEASE}")


def cached_teacher(run_dir: Path, stated: TeacherConfig) -> dict[str, Any] | None:
    """Fingerprint of the teacher in the cache that a run learned from; None where it had none."""
    if stated.cache_path is None or not (run_dir / PROTOTYPES).is_file():
        return None
    fingerprint: dict[str, Any] = load_prototypes(run_dir / PROTOTYPES).fingerprint["teacher"]
    return fingerprint


def export_model(
    model: nn.Module,
    output: Path,
    *,
    card: Card,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    onnx: bool = False,
) -> Path:
    """Write an export folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads strictly.

    The folder is built beside `output`, loaded from there and compared with `model` to the bit, and only then
    takes its name.

    Args:
        model: a timm ViT without a classifier.
        output: the folder; must not exist, be empty, or hold an earlier export.
        card: what the model card says; its `img_size` is the input size of the export.
        mean, std: normalisation that the model was trained with.
        onnx: also write ONNX.

    Raises:
        UserError: the folder holds something else, the disk is full, or the export does not load back equal.
    """
    if output.exists() and any(output.iterdir()) and not (output / SUMS).is_file():
        raise UserError(
            f"{output}: the folder is not empty and holds no earlier export ({SUMS} is missing). "
            "Choose another --output, so that nothing of yours is overwritten."
        )
    model = copy.deepcopy(model).cpu().eval()  # the caller's stays where it is
    building = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    earlier = output.with_name(f"{output.name}.old-{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    try:
        with explain_disk_errors(output):
            building.mkdir(parents=True)
            state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
            # safetensors' own writer gives files to their owner alone, and tells no disk error as one.
            (building / WEIGHTS).write_bytes(save(state, metadata={"format": "pt"}))
            (building / CONFIG).write_text(_config_json(model, building, card, mean, std))
            (building / HUBCONF).write_text(_HUBCONF)
            (building / CARD).write_text(render_card(card, model))
            if onnx:
                write_onnx(model, building / ONNX, img_size=card.img_size)
            verify_export(building, model, img_size=card.img_size)
            _write_sums_and_sync(building)
            if output.exists():
                output.replace(earlier)
            building.replace(output)
            shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return output


def verify_export(folder: Path, model: nn.Module, *, img_size: int) -> None:
    """Load the export as a user would and compare weights and tokens with `model`, to the bit.

    Raises:
        UserError: a weight or the output differs; the first difference is named.
    """
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    expected, got = model.state_dict(), loaded.state_dict()
    differing = [
        name for name in {**expected, **got}
        if name not in expected or name not in got or not torch.equal(expected[name], got[name])
    ]  # fmt: skip
    images = torch.randn(1, 3, img_size, img_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        same = torch.equal(model.forward_features(images), loaded.forward_features(images))  # type: ignore[operator]
    if differing or not same:
        what = f"weights {differing[:3]} differ" if differing else "weights are equal, the tokens are not"
        raise UserError(
            f"{folder}: loaded by timm {timm.__version__}, the export is not the student: {what}. "
            "Install the timm version of requirements.lock and export again."
        )


def _config_json(
    model: nn.Module, folder: Path, card: Card, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> str:
    path = folder / CONFIG
    data = {"input_size": (3, card.img_size, card.img_size), "mean": mean, "std": std, "crop_pct": 0.875}
    save_config_for_hf(model, str(path), data_config=data)
    config: dict[str, Any] = json.loads(path.read_text())
    for name in TRAINING_ARGS:
        config["model_args"].pop(name, None)
    del config["model_args"]["num_classes"]  # stated above them, and transformers gives its own
    # timm copies what it knows of the released weights of this architecture; these are others.
    for name in ("tag", "origin_url", "paper_ids", "paper_name", "notes"):
        config["pretrained_cfg"].pop(name, None)
    config["pretrained_cfg"]["license"] = card.licence
    return json.dumps(config, indent=2) + "\n"


def _write_sums_and_sync(folder: Path) -> None:
    (folder / SUMS).write_text("".join(f"{file_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())))
    # On disk before the folder takes its name: a power cut must not leave a named export of empty files.
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def main() -> int:
    """Command line; returns the exit status."""
    arguments = tyro.cli(ExportArgs, use_underscores=True, description=(__doc__ or "").splitlines()[0])

    def export_and_say() -> None:
        folder = export_run(arguments)
        print(f'{folder}: written and verified. timm.create_model("local-dir:{folder}", pretrained=True) loads it.')

    return run_command(export_and_say)


UNKNOWN_LICENCE = "unknown"
# Identifiers that model hubs know; another licence is "other" with its name.
HUB_LICENCES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0")

_NOTES = {
    "dinov3-license": (
        "The teacher's weights are under Meta's DINOv3 License "
        "(https://ai.meta.com/resources/models-and-libraries/dinov3-license/), which also covers works "
        "derived from them, this student included. Pass these weights on only under that agreement and with "
        "a copy of it, acknowledge DINOv3 in publications, and keep to its restrictions of use. Read it "
        "before you use or share this model."
    ),
    "apache-2.0": (
        "The teacher's weights are under the Apache License 2.0 "
        "(https://www.apache.org/licenses/LICENSE-2.0). Keep its notice when you pass these weights on."
    ),
    UNKNOWN_LICENCE: (
        "The licence of the teacher's weights is not known to this export. The licence of a teacher may "
        "cover models distilled from it: look it up before you share these weights, and state it here. "
        "If they are Meta's DINOv3, or derived from it, it is the DINOv3 License."
    ),
}


@dataclass(frozen=True)
class Card:
    """What a model card states.

    Attributes:
        name: of the model.
        student_arch: architecture of the student.
        teacher_arch: architecture and weights of the teacher.
        licence: identifier of the licence, "unknown" where it is not known.
        step: optimizer step of the checkpoint.
        ema: whether the weights are the EMA.
        img_size: side of the global crops in training, in pixels.
        probe: content of probe.json, None where the run was not probed.
        own_weights: name of the user's file that the teacher's weights were read from and the licence concluded for.
    """

    name: str
    student_arch: str
    teacher_arch: str
    licence: str
    step: int
    ema: bool
    img_size: int
    probe: dict[str, Any] | None = None
    own_weights: str | None = None


def student_detail(step: int, ema: bool) -> str:
    """Which weights of a run these are, in the words of probe.json."""
    return f"step {step}{', EMA' if ema else ''}"


def teacher_licence(arch: str, weights: str | None = None) -> str:
    """Licence of a teacher's weights, by where they are from.

    Args:
        arch: as --teacher_arch.
        weights: as --teacher_pretrained_weights.

    Returns:
        What timm says of the release that the config.json with the weights names, or that file itself; else what timm
        says of the architecture's own weights, or Meta's for a DINOv3 of the hub; else "unknown".
    """
    source, _, name = arch.partition(":") if ":" in arch else ("", "", arch)
    place: str | None = name if source == "local-dir" else None
    if hub := source in ("hf-hub", "hf_hub"):
        repository, _, revision = name.partition("@")
        found = try_to_load_from_cache(repository, "config.json", revision=revision or None)
        place, name = (str(Path(found).parent) if isinstance(found, str) else None), repository.rpartition("/")[2]
    stated = stated_origin(place) if place else {}
    if weights is not None:
        name = stated.get("architecture") or name  # of the folder that gave the architecture alone
        stated = stated_origin(weights)
    if stated:
        released = _timm_licence(f"{stated['architecture']}.{stated['tag']}") if "tag" in stated else None
        return released or stated.get("license") or UNKNOWN_LICENCE
    meta = "dinov3-license" if hub and "dinov3" in name.lower() else None
    return _timm_licence(name) or meta or UNKNOWN_LICENCE


def _timm_licence(name: str) -> str | None:
    """Licence of the weights that timm has under a name, None where it has or states none."""
    name = timm_name(name)
    try:
        config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # a tag that timm does not know
        config = None
    return config.license if config is not None else None


_VIT_USE = """tokens = model.forward_features(images)            # [b, model.num_prefix_tokens + n, d]
cls, patches = tokens[:, 0], tokens[:, model.num_prefix_tokens:]"""
_CNN_USE = """features = model.forward_features(images)          # the last map, [b, d, h, w]
pooled = model.forward_head(features, pre_logits=True)"""


def render_card(card: Card, model: nn.Module) -> str:
    """The card as Markdown with the front matter that model hubs read."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    use = _VIT_USE if has_cls_token(model) else _CNN_USE
    weights = "EMA of the student" if card.ema else "student"
    note = _NOTES.get(
        card.licence, f"The teacher's weights are under {card.licence}. Read it before you share this model."
    )
    if card.own_weights and card.licence != UNKNOWN_LICENCE:
        note += (
            f"\n\nThe teacher's weights were read from `{card.own_weights}`, a file of the user's. This licence is the "
            "one that the config.json with it states, or else that of the weights which timm has for the architecture. "
            "If the file holds others, theirs counts: look it up, and export again with --licence."
        )
    front = ["library_name: timm", "tags: [image-feature-extraction, distillation]"]
    if card.licence.lower() in HUB_LICENCES:
        front.insert(0, f"license: {card.licence.lower()}")
    elif card.licence != UNKNOWN_LICENCE:
        front.insert(0, f"license: other\nlicense_name: {card.licence}")
    return f"""---
{chr(10).join(front)}
---

# {card.name}

A {card.student_arch} ({num_parameters / 1e6:.1f} M parameters) distilled from the frozen teacher
`{card.teacher_arch}`: {weights} at step {card.step}, trained on global crops of {card.img_size} px.

```python
import timm
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
{use}
```

`config.json` holds the normalisation and input size; `sha256sum -c SHA256SUMS` checks the files.

## Accuracy of frozen features

{_accuracy(card)}

## Licence

{note}
"""


def _accuracy(card: Card) -> str:
    probe = card.probe
    if probe is None:
        return "Not measured: the run was not probed before the export."
    probed = next((model["detail"] for model in probe["models"] if model["name"] == "student"), "another model")
    if probed != student_detail(card.step, card.ema):
        return f"Not measured for these weights: the run was last probed at {probed}."
    if any(model["best"] is None for model in probe["models"]):
        return "Not measured: the run was probed on shards without labels."
    lines = ["| model | " + " | ".join(f"k-NN@{k}" for k in probe["protocol"]["knn_k"]) + " | linear |"]
    lines.append("|---|" + "---|" * (len(probe["protocol"]["knn_k"]) + 1))
    for model in probe["models"]:
        cells = [f"{model['knn'][str(k)]:.2f}" for k in probe["protocol"]["knn_k"]]
        lines.append(f"| {model['name']} | {' | '.join(cells)} | {model['best']['top1']:.2f} |")
    lines.append(f"\nTop-1 in percent on the run's val shards, protocol `{probe['protocol_sha256'][:12]}`.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
