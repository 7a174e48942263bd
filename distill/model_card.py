"""Writes the model card of an export, with the licence that the teacher's weights put on the student."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from distill.teacher import LOCAL_DIR

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
        "cover models distilled from it: look it up before you share these weights, and state it here."
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
    """

    name: str
    student_arch: str
    teacher_arch: str
    licence: str
    step: int
    ema: bool
    img_size: int
    probe: dict[str, Any] | None = None


def student_detail(step: int, ema: bool) -> str:
    """Which weights of a run these are, in the words of probe.json."""
    return f"step {step}{', EMA' if ema else ''}"


def teacher_licence(teacher_arch: str) -> str:
    """Licence of the teacher's weights as timm or the teacher's own folder states it, else "unknown"."""
    if teacher_arch.startswith(LOCAL_DIR):
        path = Path(teacher_arch.removeprefix(LOCAL_DIR)) / "config.json"
        config = json.loads(path.read_text()) if path.is_file() else {}
        return config.get("pretrained_cfg", {}).get("license") or UNKNOWN_LICENCE
    stated = timm.get_pretrained_cfg(teacher_arch) if timm.is_model(teacher_arch) else None
    return (stated.license if stated is not None else None) or UNKNOWN_LICENCE


def render_card(card: Card, num_parameters: int) -> str:
    """The card as Markdown with the front matter that model hubs read."""
    weights = "EMA of the student" if card.ema else "student"
    note = _NOTES.get(
        card.licence, f"The teacher's weights are under {card.licence}. Read it before you share this model."
    )
    front = ["library_name: timm", "tags: [image-feature-extraction, distillation]"]
    if card.licence in HUB_LICENCES:
        front.insert(0, f"license: {card.licence}")
    elif card.licence != UNKNOWN_LICENCE:
        front.insert(0, f"license: other\nlicense_name: {card.licence}")
    return f"""---
{chr(10).join(front)}
---

# {card.name}

A {card.student_arch} ViT ({num_parameters / 1e6:.1f} M parameters) distilled from the frozen teacher
`{card.teacher_arch}`: {weights} at step {card.step}, trained on global crops of {card.img_size} px.

```python
import timm
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
tokens = model.forward_features(images)            # [b, model.num_prefix_tokens + n, d]
cls, patches = tokens[:, 0], tokens[:, model.num_prefix_tokens:]
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
    lines = ["| model | " + " | ".join(f"k-NN@{k}" for k in probe["protocol"]["knn_k"]) + " | linear |"]
    lines.append("|---|" + "---|" * (len(probe["protocol"]["knn_k"]) + 1))
    for model in probe["models"]:
        cells = [f"{model['knn'][str(k)]:.2f}" for k in probe["protocol"]["knn_k"]]
        lines.append(f"| {model['name']} | {' | '.join(cells)} | {model['best']['top1']:.2f} |")
    lines.append(f"\nTop-1 in percent on the run's val shards, protocol `{probe['protocol_sha256'][:12]}`.")
    return "\n".join(lines)
