"""Creates the ViTs from timm and runs a student over crops of several sizes in one packed pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers import apply_rot_embed_cat
from timm.models.eva import Eva
from torch import Tensor, nn

from common.errors import UserError
from distill.config import StudentConfig
from distill.weights import load_state, load_weights

FAMILY = ("vit_tiny", "vit_small", "vit_base", "vit_large")


def create_vit(
    arch: str, *, patch_size: int = 16, pretrained: bool = False, model_args: dict[str, Any] | None = None
) -> nn.Module:
    """Create a timm ViT without a classifier, whose features are its final-norm tokens.

    Args:
        arch: one of `FAMILY` (timm's DINOv3 models of that size) or any name that timm knows.
        patch_size: side of a patch; used with a `FAMILY` name only.
        pretrained: load the weights that timm names.
        model_args: further arguments of the model's constructor.

    Returns:
        A model whose `forward_features` gives [b, num_prefix_tokens + n, embed_dim].

    Raises:
        UserError: timm does not know the architecture, or it has no class token.
        OSError: pretrained weights could not be found or downloaded.
    """
    args: dict[str, Any] = {"num_classes": 0, "global_pool": "token", **(model_args or {})}
    name = arch
    if arch in FAMILY:
        # vit_tiny exists only with biases in the DINOv3 family.
        name = f"{arch}_patch16_dinov3" + ("_qkvb" if arch == "vit_tiny" else "")
        args["patch_size"] = patch_size
    try:
        model = timm.create_model(name, pretrained=pretrained, **args)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise UserError(
            f"architecture {arch}: timm cannot create it ({str(error).splitlines()[0]}). "
            f"Use one of {', '.join(FAMILY)}, a timm ViT with a class token, or local-dir:FOLDER."
        ) from error
    if getattr(model, "cls_token", None) is None:
        raise UserError(f"architecture {arch}: it has no class token, which the losses need. Choose another ViT.")
    return model


def create_student(config: StudentConfig, *, seed: int) -> Eva:
    """Create the student with weights drawn from `seed`; UserError where the packed pass cannot run it."""
    overrides = {
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "init_values": config.layer_scale,
        "drop_path_rate": config.drop_path_rate,
    }
    args = {name: value for name, value in overrides.items() if value is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_vit(config.arch, patch_size=config.patch_size, model_args=args)
    return _packable(model, config.arch)


def load_initial_weights(student: Eva, config: StudentConfig) -> None:
    """Give a student the weights that `config.init` names; nothing where it names none.

    Raises:
        UserError: they cannot be read, found or downloaded, or do not fit.
    """
    if config.init == "pretrained":
        try:
            named = create_vit(config.arch, patch_size=config.patch_size, pretrained=True)
        except OSError as error:
            raise UserError(
                f"--init pretrained: the weights of {config.arch} could not be found or downloaded "
                f"({str(error).partition(chr(10))[0]}). Give a local file or folder."
            ) from error
        load_state(student, named.state_dict(), where=f"--init pretrained ({config.arch})")
    elif config.init is not None:
        load_weights(student, config.init)


def _packable(model: Any, arch: str) -> Eva:
    blocks: list[Any] = list(getattr(model, "blocks", []))
    packable = (
        isinstance(model, Eva)
        and model.rope is not None
        and model.pos_embed is None
        and not model.rope_mixed
        and all(getattr(block.attn, "qkv", None) is not None and block.attn.gate is None for block in blocks)
    )
    if not packable:
        raise UserError(
            f"--arch {arch}: the student must be a timm Eva ViT with RoPE, no absolute position embedding and "
            f"fused qkv, such as {', '.join(FAMILY)}."
        )
    assert isinstance(model, Eva)
    return model


def rope_table(model: Eva, crop_size: int) -> Float[Tensor, "n e"]:
    """Return RoPE's sine and cosine for the patch grid of a square crop of `crop_size` pixels, fp32 on the CPU.

    timm rebuilds this table at every forward pass of a model with dynamic image size; here it is made once.
    """
    side = crop_size // int(model.patch_embed.patch_size[0])
    rope: Any = model.rope
    table: Tensor = rope.get_embed(shape=(side, side))
    return table.detach().clone()


def packed_tokens(
    model: Eva,
    crops: Sequence[Float[Tensor, "b c h w"]],
    ropes: Sequence[Float[Tensor, "n e"]],
    *,
    mask: Bool[Tensor, "b n"] | None = None,
    mask_token: Float[Tensor, " d"] | None = None,
) -> list[Float[Tensor, "b t d"]]:
    """Run one ViT over crops of several sizes at once.

    The tokens of all sizes are one sequence for norms, linear layers and MLPs, and separate for attention, so
    there are half the kernels of one pass per size and the same gradients.

    Args:
        model: the student (see `create_student`).
        crops: one normalised batch per crop size, NCHW.
        ropes: `rope_table` of each size.
        mask: patches of the first size to replace by `mask_token`.
        mask_token: embedding of a masked patch; needed with `mask`.

    Returns:
        Final-norm tokens of each size: class token, registers, patches.
    """
    sequences = [
        _embed(model, x, mask if i == 0 else None, mask_token) for i, x in enumerate(crops)
    ]  # each [b, t, d]
    shapes = [(x.shape[0], x.shape[1]) for x in sequences]
    packed = torch.cat([x.flatten(0, 1) for x in sequences])  # [sum of b*t, d]
    for block in model.blocks:
        packed = _packed_block(block, packed, shapes, ropes)
    parts = model.norm(packed).split([b * t for b, t in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def _embed(model: Eva, crops: Tensor, mask: Tensor | None, mask_token: Tensor | None) -> Tensor:
    x = model.patch_embed.norm(model.patch_embed.proj(crops).flatten(2).transpose(1, 2))  # [b, n, d]
    if mask is not None:
        assert mask_token is not None
        x = torch.where(mask[..., None], mask_token.to(x.dtype), x)
    prefix = [token for token in (model.cls_token, model.reg_token) if token is not None]
    x = torch.cat([token.to(x.dtype).expand(x.shape[0], -1, -1) for token in prefix] + [x], dim=1)
    return model.norm_pre(x)


def _packed_block(
    block: nn.Module, x: Tensor, shapes: Sequence[tuple[int, int]], ropes: Sequence[Tensor]
) -> Tensor:
    attention: Any = block.attn
    qkv = F.linear(block.norm1(x), attention.qkv.weight, _qkv_bias(attention))  # type: ignore[operator]
    mixed = []
    for part, shape, rope in zip(qkv.split([b * t for b, t in shapes]), shapes, ropes, strict=True):
        mixed.append(_attend(attention, part.unflatten(0, shape), rope).flatten(0, 1))
    y = attention.proj(attention.norm(torch.cat(mixed)))
    x = x + _residual(block.drop_path1, block.gamma_1, y, shapes)
    y = block.mlp(block.norm2(x))  # type: ignore[operator]
    return x + _residual(block.drop_path2, block.gamma_2, y, shapes)


def _qkv_bias(attention: Any) -> Tensor | None:
    if attention.q_bias is None:
        return None
    return torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))


def _attend(attention: Any, qkv: Tensor, rope: Tensor) -> Tensor:
    b, t, _ = qkv.shape
    q, k, v = qkv.view(b, t, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # [b, heads, t, e]
    q, k = attention.q_norm(q), attention.k_norm(k)
    prefix = attention.num_prefix_tokens
    q, k = (
        torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, half=attention.rotate_half)], 2)
        for x in (q, k)
    )
    return F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v).transpose(1, 2).reshape(b, t, -1)


def _residual(drop_path: Any, gamma: Any, y: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    if gamma is not None:
        y = gamma * y
    if isinstance(drop_path, nn.Identity):
        return y
    # DropPath drops whole crops, so the packed sequence is cut into crops again.
    parts = y.split([b * t for b, t in shapes])
    return torch.cat([drop_path(p.unflatten(0, s)).flatten(0, 1) for p, s in zip(parts, shapes, strict=True)])
