"""Creates timm models, takes their tokens, and runs a ViT over crops of several sizes in one packed pass."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers import Mlp, RotaryEmbeddingDinoV3, apply_rot_embed_cat
from timm.models.eva import Eva, EvaBlock
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from distill.config import StudentConfig
from distill.weights import load_state, load_weights

FAMILY = ("vit_tiny", "vit_small", "vit_base", "vit_large")


def create_backbone(
    arch: str,
    *,
    patch_size: int = 16,
    pretrained: bool = False,
    model_args: dict[str, Any] | None = None,
    vit_args: dict[str, Any] | None = None,
) -> nn.Module:
    """Create a timm model without a classifier, of which `cls_and_patches` gives the tokens.

    Args:
        arch: one of `FAMILY` (timm's DINOv3 models of that size) or any name that timm knows.
        patch_size: side of a patch; used with a `FAMILY` name only.
        pretrained: load the weights that timm names.
        model_args: further arguments of the model's constructor.
        vit_args: the same, for a model that takes them.

    Raises:
        UserError: timm cannot create it.
        OSError: pretrained weights could not be found or downloaded.
    """
    args: dict[str, Any] = {"num_classes": 0, **(model_args or {})}
    name = timm_name(arch)
    if arch in FAMILY:
        args["patch_size"] = patch_size
    # A ViT whose features are its final-norm tokens; else one without a class token; else a CNN.
    kinds: tuple[dict[str, Any], ...] = ({"global_pool": "token", **(vit_args or {})}, vit_args or {}, {})
    for kind in kinds:
        try:
            return timm.create_model(name, pretrained=pretrained, **args, **kind)
        except (RuntimeError, TypeError, AssertionError) as error:
            last = error
    raise UserError(
        f"architecture {arch}: timm cannot create it ({str(last).splitlines()[0]}). "
        f"Use one of {', '.join(FAMILY)}, another timm ViT or CNN, or local-dir:FOLDER, or leave out a setting that it "
        "names."
    ) from last


def timm_name(arch: str) -> str:
    """Return timm's name of an architecture, which for one of `FAMILY` is that of its DINOv3 model."""
    if arch not in FAMILY:
        return arch
    return f"{arch}_patch16_dinov3" + ("_qkvb" if arch == "vit_tiny" else "")  # exists only with biases


def has_cls_token(model: Any) -> bool:
    """Whether a timm model has a class token; else its pooled features stand in its place."""
    return getattr(model, "cls_token", None) is not None


def dinov3_rope(model: Any) -> Any:
    """Return a model's RoPE where it is DINOv3's, else None."""
    rope = getattr(model, "rope", None)
    return rope if isinstance(rope, RotaryEmbeddingDinoV3) else None


def statistics_names(model: nn.Module) -> tuple[str, ...]:
    """Name the buffers that training changes, such as batch norm's: those of the state dict."""
    kept = model.state_dict()
    return tuple(name for name, _ in model.named_buffers() if name in kept)


def cls_and_patches(
    model: Any, images: Float[Tensor, "b c h w"]
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n e"]]:
    """Return the class token and the patch tokens of images, by timm's own forward pass.

    A model without a class token has its pooled features in its place; a CNN the places of its last map as patches.
    """
    features: Tensor = model.forward_features(images)
    if has_cls_token(model):
        return features[:, 0], features[:, model.num_prefix_tokens :]
    pooled = model.forward_head(features, pre_logits=True)
    if features.ndim == 4:
        channels_first = features.shape[1] == token_widths(model)[1]
        return pooled, features.flatten(2).mT if channels_first else features.flatten(1, 2)
    return pooled, features[:, getattr(model, "num_prefix_tokens", 0) :]


def token_widths(model: Any) -> tuple[int, int]:
    """Return the width of `cls_and_patches`' class tokens and of its patch tokens."""
    width = int(model.num_features)
    return width if has_cls_token(model) else int(model.head_hidden_size), width


def patch_side(model: Any) -> int:
    """Return the side of a patch in pixels; of a CNN, the pixels to a side of one place of its last map."""
    return int(model.feature_info[-1]["reduction"])


def create_student(config: StudentConfig, *, seed: int) -> nn.Module:
    """Create the student with weights drawn from `seed`; UserError where its patches are of another size."""
    overrides = {
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "init_values": config.layer_scale,
        "drop_path_rate": config.drop_path_rate or None,  # not every CNN takes it
    }
    args = {name: value for name, value in overrides.items() if value is not None}
    # Global and local crops differ in size, which timm's ViTs with absolute positions take only if told so.
    vit_args = {} if config.arch in FAMILY else {"dynamic_img_size": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_backbone(config.arch, patch_size=config.patch_size, model_args=args, vit_args=vit_args)
    if patch_side(model) != config.patch_size:
        raise UserError(
            f"--arch {config.arch} --patch_size {config.patch_size}: its patches are {patch_side(model)} pixels wide. "
            f"Give --patch_size {patch_side(model)}."
        )
    return model


def load_initial_weights(student: nn.Module, config: StudentConfig) -> None:
    """Give a student the weights that `config.init` names; nothing where it names none.

    Raises:
        UserError: they cannot be read, found or downloaded, or do not fit.
    """
    if config.init == "pretrained":
        try:
            named = create_backbone(config.arch, patch_size=config.patch_size, pretrained=True)
        except OSError as error:
            raise UserError(
                f"--init pretrained: the weights of {config.arch} could not be found or downloaded "
                f"({str(error).partition(chr(10))[0]}). Give a local file or folder."
            ) from error
        load_state(student, named.state_dict(), where=f"--init pretrained ({config.arch})")
    elif config.init is not None:
        load_weights(student, config.init)


def is_packable(model: Any) -> bool:
    """Whether `packed_tokens` can run a model: a timm Eva ViT with RoPE, no absolute positions and fused qkv."""
    return (
        isinstance(model, Eva)
        and model.cls_token is not None
        and model.rope is not None
        and model.pos_embed is None
        and not model.rope_mixed
        and all(isinstance(b, EvaBlock) and b.attn.qkv is not None and b.attn.gate is None for b in model.blocks)
    )


def check_plain_student(model: nn.Module, crop_sizes: Sequence[int], *, arch: str, masks: bool) -> None:
    """UserError where a student that cannot be packed does not take the run's crops, or masks are asked of it."""
    if masks:
        raise UserError(
            f"--arch {arch}: masks of the student's input need the packed pass, which it cannot take. Choose one of "
            f"{', '.join(FAMILY)}, or a preset without --mask_student_input and --proteus_loss_weight."
        )
    judged = copy.deepcopy(model).eval()
    for size in crop_sizes:
        try:
            with torch.no_grad():
                patches = cls_and_patches(judged, torch.zeros(1, 3, size, size))[1]
        except (RuntimeError, AssertionError, AttributeError) as error:
            raise UserError(
                f"--arch {arch}: it does not take crops of {size} pixels ({str(error).splitlines()[0]}). "
                "Choose another student."
            ) from error
        expected = (1, (size // patch_side(model)) ** 2, token_widths(model)[1])
        if patches.shape != expected:
            raise UserError(
                f"--arch {arch}: of a crop of {size} pixels it gives {tuple(patches.shape)} where {expected} is "
                "expected. Choose another student."
            )


def rope_table(model: Eva, crop_size: int) -> Float[Tensor, "t e"]:
    """Return RoPE's sine and cosine for the tokens of a square crop of `crop_size` pixels, fp32 on the CPU.

    Class token and registers, which come first, turn by nothing: sine 0 and cosine 1, so that no token is treated
    apart. timm rebuilds its table at every forward pass of a model with dynamic image size; here it is made once.
    """
    side = crop_size // patch_side(model)
    rope: Any = model.rope
    table: Tensor = rope.get_embed(shape=(side, side)).detach()
    still = table.new_zeros(model.num_prefix_tokens, table.shape[1])
    still[:, table.shape[1] // 2 :] = 1
    return torch.cat([still, table])


def packed_tokens(
    model: Eva,
    crops: Sequence[Float[Tensor, "b c h w"]],
    ropes: Sequence[Float[Tensor, "t e"]],
    *,
    masks: Sequence[Bool[Tensor, "b n"] | None] | None = None,
    mask_token: Float[Tensor, " d"] | None = None,
    residual_in_fp32: bool = True,
) -> list[Float[Tensor, "b t d"]]:
    """Run one ViT over crops of several sizes at once.

    The tokens of all sizes are one sequence for norms, linear layers and MLPs, and separate for attention, so
    there are half the kernels of one pass per size and the same gradients.

    Args:
        model: the student (see `create_student`).
        crops: normalised batches, NCHW, each of one crop size.
        ropes: `rope_table` of each batch's size.
        masks: for each batch the patches to replace by `mask_token`, or None.
        mask_token: embedding of a masked patch; needed with `masks`.
        residual_in_fp32: keep what the blocks add to in fp32 under autocast too. A block with a LayerScale of 1e-5
            adds less than bf16's rounding.

    Returns:
        Final-norm tokens of each size: class token, registers, patches.
    """
    pairs = zip(crops, masks or [None] * len(crops), strict=True)
    sequences = [_embed(model, x, mask, mask_token) for x, mask in pairs]  # each [b, t, d]
    shapes = [(x.shape[0], x.shape[1]) for x in sequences]
    packed = torch.cat([x.flatten(0, 1) for x in sequences])  # [sum of b*t, d]
    if residual_in_fp32:
        packed = packed.to(torch.promote_types(packed.dtype, torch.float32))
    rope = torch.cat([r.repeat(b, 1) for r, (b, _) in zip(ropes, shapes, strict=True)])[:, None]  # [sum of b*t, 1, e]
    for block in model.blocks:
        if model.grad_checkpointing:
            packed = checkpoint(_packed_block, block, packed, shapes, rope, use_reentrant=False)
        else:
            packed = _packed_block(block, packed, shapes, rope)
    return [part.unflatten(0, s) for part, s in zip(_parts(model.norm(packed), shapes), shapes, strict=True)]


def _parts(packed: Tensor, shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    return packed.split([b * t for b, t in shapes])


def _embed(model: Eva, crops: Tensor, mask: Tensor | None, mask_token: Tensor | None) -> Tensor:
    x = model.patch_embed.norm(model.patch_embed.proj(crops).flatten(2).transpose(1, 2))  # [b, n, d]
    if mask is not None:
        assert mask_token is not None
        x = torch.where(mask[..., None], mask_token.to(x.dtype), x)
    prefix = [token for token in (model.cls_token, model.reg_token) if token is not None]
    x = torch.cat([token.to(x.dtype).expand(x.shape[0], -1, -1) for token in prefix] + [x], dim=1)
    return model.norm_pre(x)


def _packed_block(block: Any, x: Tensor, shapes: Sequence[tuple[int, int]], rope: Tensor) -> Tensor:
    attention = block.attn
    qkv = F.linear(_affine_norm(block.norm1, x), attention.qkv.weight, _qkv_bias(attention))
    q, k, v = qkv.view(len(x), 3, attention.num_heads, -1).unbind(1)  # [sum of b*t, heads, e]
    q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = (apply_rot_embed_cat(y, rope, half=attention.rotate_half).type_as(v) for y in (q, k))
    mixed = attention.norm(_attend(q, k, v, shapes).flatten(1))
    x = x + _drop(block.drop_path1, _scaled_linear(attention.proj, block.gamma_1, mixed), shapes).to(x.dtype)
    mlp = block.mlp
    if isinstance(mlp, Mlp):
        hidden = mlp.norm(mlp.act(_normed_linear(block.norm2, mlp.fc1, x)))
        y = _scaled_linear(mlp.fc2, block.gamma_2, hidden)
    else:  # SwiGLU: two layers behind the norm
        y = mlp(block.norm2(x))
        y = y if block.gamma_2 is None else block.gamma_2 * y
    return x + _drop(block.drop_path2, y, shapes).to(x.dtype)


def _affine_norm(norm: Any, x: Tensor) -> Tensor:
    if not isinstance(norm, nn.LayerNorm):
        return norm(x)
    return _standardised(x, norm.eps) * norm.weight + norm.bias


def _normed_linear(norm: Any, linear: Any, x: Tensor) -> Tensor:
    """A linear layer behind a norm, whose affine map works on the weights: neither pass goes over the tokens for it."""
    if not isinstance(norm, nn.LayerNorm):
        return linear(norm(x))
    weight = linear.weight
    return F.linear(_standardised(x, norm.eps), weight * norm.weight, linear.bias + (weight * norm.bias).sum(1))


def _standardised(x: Tensor, eps: float) -> Tensor:
    """LayerNorm without an affine map, in the dtype of the product that reads it."""
    on = torch.is_autocast_enabled(x.device.type)
    y: Tensor = _Standardise.apply(x, eps, torch.get_autocast_dtype(x.device.type) if on else x.dtype)
    return y


class _Standardise(torch.autograd.Function):
    """Its backward pass reads the rounded result, which the weights' gradient needs too, and no fp32 copy of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        scale = torch.rsqrt(variance + eps)
        y = ((x - mean) * scale).to(dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        y, scale = ctx.saved_tensors
        y, gradient = y.to(scale.dtype), gradient.to(scale.dtype)
        along = gradient.mean(-1, keepdim=True) + y * (gradient * y).mean(-1, keepdim=True)
        return (scale * (gradient - along)).to(ctx.dtype), None, None


def _scaled_linear(linear: Any, gamma: Tensor | None, x: Tensor) -> Tensor:
    """A linear layer with LayerScale, on the weights too. The bias is added by the kernel that reads the sum."""
    if gamma is None:
        return linear(x)
    y = F.linear(x, gamma[:, None] * linear.weight)
    return y + (gamma * linear.bias).to(y.dtype)


def _qkv_bias(attention: Any) -> Tensor | None:
    if attention.q_bias is None:
        return None
    return torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))


def _attend(q: Tensor, k: Tensor, v: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Attention of each crop to itself alone; all tensors packed, [sum of b*t, heads, e]."""
    if _has_varlen(v):  # one kernel for all sizes; nothing is cut and joined, forward and backward
        ends, start = [], 0
        for b, t in shapes:
            ends.append(torch.arange(start, start + b * t, t, dtype=torch.int32, device=v.device))
            start += b * t
        bounds = torch.cat([*ends, ends[0].new_full((1,), start)])
        longest = max(t for _, t in shapes)
        return varlen_attn(q, k, v, bounds, bounds, longest, longest)  # type: ignore[return-value]
    mixed = []
    for *parts, shape in zip(*(_parts(y, shapes) for y in (q, k, v)), shapes, strict=True):
        heads_first = (y.unflatten(0, shape).transpose(1, 2) for y in parts)  # [b, heads, t, e]
        mixed.append(F.scaled_dot_product_attention(*heads_first).transpose(1, 2).flatten(0, 1))
    return torch.cat(mixed)


def _has_varlen(v: Tensor) -> bool:
    if not v.is_cuda or v.dtype not in (torch.bfloat16, torch.float16) or v.shape[-1] % 8:
        return False
    return torch.cuda.get_device_capability(v.device) >= (8, 0)


def _drop(drop_path: Any, y: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    if isinstance(drop_path, nn.Identity):
        return y
    # DropPath drops whole crops, so the packed sequence is cut into crops again.
    parts = zip(_parts(y, shapes), shapes, strict=True)
    return torch.cat([drop_path(part.unflatten(0, shape)).flatten(0, 1) for part, shape in parts])
