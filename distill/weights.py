"""Reads ViT weights from disk, strictly: Meta's .pth key layout, timm's safetensors, never a pickle."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from common.errors import UserError

StateDict = dict[str, Tensor]
log = logging.getLogger(__name__)

# Present in Meta's files and without a counterpart in timm's models: training-only or recomputed buffers.
_META_TRAINING_ONLY = ("mask_token", "rope_embed.periods", "local_cls_norm.weight", "local_cls_norm.bias")
_META_TO_TIMM = {
    "storage_tokens": "reg_token",
    "ls1.gamma": "gamma_1",
    "ls2.gamma": "gamma_2",
    "mlp.w1.": "mlp.fc1_g.",
    "mlp.w2.": "mlp.fc1_x.",
    "mlp.w3.": "mlp.fc2.",
}


_HUGGINGFACE_TO_META = {
    "embeddings.patch_embeddings.": "patch_embed.proj.",
    "embeddings.register_tokens": "storage_tokens",
    "embeddings.": "",
    "layer.": "blocks.",
    "attention.o_proj": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}


def load_weights(model: nn.Module, path: str | Path) -> Tensor | None:
    """Load a local checkpoint into a timm ViT, with every key accounted for.

    Args:
        model: a timm ViT; changed in place.
        path: `.safetensors`, `.pth` or `.pt`, or a folder with model.safetensors, in the layout of timm, of Meta's
            DINOv3 or DINOv2, or of Hugging Face's DINOv3ViTModel. Absolute positions are resampled to the model's
            grid by timm.

    Returns:
        RoPE's periods where the file holds them, as Meta's does; the model keeps its own.

    Raises:
        UserError: the file is missing, not a plain state dict, or its keys or shapes differ from the
            model's; the message says what the file holds.
    """
    path = Path(path)
    state = read_state_dict(path)
    periods = state.get("rope_embed.periods")
    if "embeddings.register_tokens" in state:
        state = huggingface_to_meta(state)
    if "storage_tokens" in state:
        state = meta_to_timm(state, has_qkv_bias="blocks.0.attn.q_bias" in model.state_dict(), where=str(path))
    elif isinstance(model, VisionTransformer):
        state = checkpoint_filter_fn(state, model)  # Meta's DINOv2 keys, and a position table of another image size
    load_state(model, state, where=str(path))
    own: Tensor = getattr(getattr(model, "rope", None), "periods", torch.empty(0))
    if periods is not None and periods.shape != own.shape:
        raise UserError(
            f"{path}: {periods.numel()} rope_embed.periods, the model has {own.numel()}. The weights are of a ViT with "
            "another number of heads. Give the architecture that they were made for."
        )
    return periods


def stated_origin(path: str | Path) -> dict[str, Any]:
    """Return what timm's config.json with these weights states of them: `architecture`, `tag`, `license` and more.

    Args:
        path: a folder, or the model.safetensors in it; for any other file nothing is stated.

    Raises:
        UserError: the config.json is not JSON.
    """
    path = Path(path)
    config = (path.parent if path.name == "model.safetensors" else path) / "config.json"
    try:
        stated = json.loads(config.read_text()) if config.is_file() else {}
    except ValueError as error:
        raise UserError(f"{config}: not JSON ({error}). Restore it from where the weights came from.") from error
    named = {"architecture": stated.get("architecture")}
    return named | stated["pretrained_cfg"] if "pretrained_cfg" in stated else {}


def load_state(model: nn.Module, state: StateDict, *, where: str) -> None:
    """Load a state dict in timm's layout; UserError, beginning with `where`, if a key or shape differs."""
    problems = _differences(model.state_dict(), state)
    if problems:
        shown = "; ".join(problems[:3]) + ("; ..." if len(problems) > 3 else "")
        raise UserError(
            f"{where}: the weights do not fit the model. They are {_described(state)}. {len(problems)} tensors differ: "
            f"{shown}. Give the architecture that they were made for."
        )
    model.load_state_dict(state, strict=True)


def read_state_dict(path: Path) -> StateDict:
    """Read a state dict without unpickling anything; UserError says what the file is instead."""
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file. Pass the path of a .pth or .safetensors checkpoint.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            # torch warns of pickle protocols other than its own; what matters is said in the error below.
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path}: not a readable checkpoint ({str(error).partition(chr(10))[0] or 'it ends too early'}). "
            "Download it again, or save its state dict alone with torch.save or safetensors."
        ) from error
    for wrapper in ("model", "state_dict", "teacher"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            log.info("%s: taking what it holds as %r", path, wrapper)
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path}: holds no plain state dict (names to tensors). Save the model's state dict alone.")
    # A training checkpoint of Meta's holds the heads beside the backbone.
    backbone = {key.removeprefix("backbone."): value for key, value in loaded.items() if key.startswith("backbone.")}
    return backbone or loaded


def huggingface_to_meta(state: StateDict) -> StateDict:
    """Rename the keys of Hugging Face's `DINOv3ViTModel` to Meta's, which has queries, keys and values in one."""
    gated = any("gate_proj" in key for key in state)
    mlp = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"} if gated else {"up_proj": "fc1", "down_proj": "fc2"}
    renamed: StateDict = {}
    for key, value in state.items():
        for theirs, metas in (_HUGGINGFACE_TO_META | mlp).items():
            key = key.replace(theirs, metas)
        renamed[key] = value
    for first in [key for key in renamed if "attention.q_proj." in key]:
        query, value = renamed.pop(first), renamed.pop(first.replace("q_proj", "v_proj"))
        keys = renamed.pop(first.replace("q_proj", "k_proj"), torch.zeros_like(query))  # the keys have no bias
        renamed[first.replace("attention.q_proj", "attn.qkv")] = torch.cat([query, keys, value])
    return renamed


def _described(state: StateDict) -> str:
    """What a state dict is of, in a few words, with timm's likely name for it."""
    patches = state.get("patch_embed.proj.weight")
    if patches is None:
        return "not those of a ViT"
    width, side = patches.shape[0], patches.shape[-1]
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    size = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge_plus"}
    name = {14: "dinov2", 16: "dinov3"}.get(side)
    likely = f", likely vit_{size[width, depth]}_patch{side}_{name}" if name and (width, depth) in size else ""
    return f"of a ViT of width {width}, depth {depth} and patch size {side}{likely}"


def meta_to_timm(state: StateDict, *, has_qkv_bias: bool, where: str) -> StateDict:
    """Rename the keys of Meta's DINOv3 release to timm's.

    `qkv.bias` counts only where `qkv.bias_mask` is not zero (Meta masks the bias of the keys). A model without
    these biases accepts them only when they are zero, as they are in the distilled releases.
    """
    renamed: StateDict = {}
    for key, value in state.items():
        if key in _META_TRAINING_ONLY or key.endswith("qkv.bias_mask"):
            continue
        if key.endswith("qkv.bias"):
            mask = state.get(key + "_mask")
            bias = value if mask is None else torch.where(mask == 0, torch.zeros_like(value), value)
            q_bias, k_bias, v_bias = bias.chunk(3)
            if torch.count_nonzero(k_bias if has_qkv_bias else bias):
                raise UserError(
                    f"{where}: {key} is not zero and the model has no place for it. "
                    "Use the _qkvb variant of the architecture."
                )
            if has_qkv_bias:
                renamed[key.replace("qkv.bias", "q_bias")] = q_bias
                renamed[key.replace("qkv.bias", "v_bias")] = v_bias
            continue
        for meta, timm in _META_TO_TIMM.items():
            key = key.replace(meta, timm)
        renamed[key] = value
    return renamed


def tensors_sha256(tensors: StateDict) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes of tensors, in sorted order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _differences(expected: StateDict, found: StateDict) -> list[str]:
    missing = [f"missing: {key} {tuple(expected[key].shape)}" for key in sorted(set(expected) - set(found))]
    extra = [f"not in the model: {key} {tuple(found[key].shape)}" for key in sorted(set(found) - set(expected))]
    misshapen = [
        f"{key}: the file has {tuple(found[key].shape)}, the model {tuple(expected[key].shape)}"
        for key in sorted(set(expected) & set(found))
        if expected[key].shape != found[key].shape
    ]
    return missing + extra + misshapen
