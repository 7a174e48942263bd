"""Trains the demo's teacher: a small ViT that learns the digits' labels, then exported as timm loads it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from demo import PATCH_SIZE
from distill.export import Card, export_model
from distill.models import create_backbone
from distill.optim import cosine_schedule
from pipeline.augmentation import Augmentation
from pipeline.batch import normalise
from pipeline.loader import open_loader

TEACHER_ARGS = {"embed_dim": 128, "depth": 4, "num_heads": 4, "init_values": 0.1}
_BATCH_SIZE = 64
_LR = 1e-3


def train_teacher(shards: Path, output: Path, *, augmentation: Augmentation, steps: int, seed: int) -> None:
    """Train a ViT on the labels of global crops and write it to `output` as a timm folder.

    Two linear classifiers, on the cls token and on the mean patch token, so that both kinds of token carry
    what the student is to learn. They are thrown away.
    """
    torch.manual_seed(seed)
    size = augmentation.global_crops_size
    model = create_backbone("vit_small", patch_size=PATCH_SIZE, model_args={**TEACHER_ARGS, "img_size": size})
    heads = nn.ModuleList([nn.Linear(TEACHER_ARGS["embed_dim"], 10) for _ in range(2)])  # type: ignore[arg-type]
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_LR, weight_decay=0.05, fused=True)
    loader = open_loader(
        shards, device="cpu", global_batch_size=_BATCH_SIZE, seed=seed, teacher_crops=False,
        augmentation=dataclasses.replace(augmentation, num_local_crops=0, mask_ratio=0.0),
    )  # fmt: skip
    with loader, tqdm(total=steps, desc="training the teacher", unit="step") as bar:
        for step, batch in zip(range(steps), loader, strict=False):
            optimizer.param_groups[0]["lr"] = cosine_schedule(
                step, start=_LR, end=_LR / 100, total_steps=steps, warmup_steps=steps // 20
            )
            crops = batch.global_crops.unflatten(0, (augmentation.num_global_crops, -1))[step % 2]
            tokens = model.forward_features(normalise(crops))  # type: ignore[operator]
            patches = tokens[:, model.num_prefix_tokens :].mean(1)
            logits = torch.stack([heads[0](tokens[:, 0]), heads[1](patches)])
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.repeat(2))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            bar.update()
            if step % 20 == 0:
                accuracy = (logits.argmax(-1) == batch.labels).float().mean().item()
                bar.set_postfix_str(f"loss {loss.item():.3f}  batch accuracy {accuracy:.0%}")
    card = Card(
        name="demo teacher", student_arch="vit_small", teacher_arch="labels of the demo's digits", licence="MIT",
        step=steps, ema=False, img_size=size, probe=None,
    )  # fmt: skip
    export_model(model.eval(), output, card=card)
