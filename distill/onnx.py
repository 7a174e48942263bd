"""Writes a student as ONNX: cls and patch tokens of any batch and any image size that its patches divide."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.errors import UserError
from distill.models import cls_and_patches, dinov3_rope, patch_side


def require_onnx() -> None:
    """UserError naming what to install where ONNX export is not possible."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--onnx: the packages {' and '.join(missing)} are not installed, which torch.onnx needs. "
            f"Run `pip install {' '.join(missing)}`, or export without --onnx."
        )


class _Tokens(nn.Module):
    """cls token and patch tokens as two outputs, so that an ONNX user need not know the prefix length."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        if _takes_any_size(model) and dinov3_rope(model):
            self.model.rope = _GridRope(model.rope)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, Tensor]:
        return cls_and_patches(self.model, images)


class _GridRope(nn.Module):
    """timm's RoPE of DINOv3 with the grid's sides as tensors can have them: timm makes floats of them, constants."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope

    def get_embed(self, shape: tuple[int, int]) -> Float[Tensor, "n e"]:
        axes = [(torch.arange(side, dtype=torch.float32) + 0.5) / side for side in shape]
        coords = torch.stack(torch.meshgrid(axes, indexing="ij"), -1).flatten(0, 1) * 2 - 1  # [h*w, 2]
        return torch.cat(self.rope._get_pos_embed_from_coords(coords), -1)  # type: ignore[operator]


def _takes_any_size(model: Any) -> bool:
    return bool(getattr(model, "dynamic_img_size", True))  # a CNN does


def write_onnx(model: Any, path: Path, *, img_size: int) -> None:
    """Write ONNX with the outputs `cls` [b, d] and `patches` [b, n, d]; any batch, and any multiple of the patch size
    where the model takes other sizes than `img_size`."""
    require_onnx()
    height, width = img_size, img_size
    sizes: dict[int, Any] = {0: torch.export.Dim("batch")}
    if _takes_any_size(model):
        patch = patch_side(model)
        height, width = 2 * patch, 3 * patch  # a side of one patch would be taken for a constant
        sizes |= {2: patch * torch.export.Dim("h"), 3: patch * torch.export.Dim("w")}
    program = torch.onnx.export(
        _Tokens(model).eval(),
        (torch.zeros(2, 3, height, width),),
        input_names=["images"],
        output_names=["cls", "patches"],
        dynamic_shapes={"images": sizes},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces with the paths of this machine
    program.save(path, external_data=False)
