"""The frozen teacher: a timm model, the final-norm tokens that losses take, and the fingerprint a cache is bound to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from common.errors import UserError
from distill.config import DEFAULT_TEACHER, TeacherConfig
from distill.models import cls_and_patches, create_backbone, dinov3_rope, patch_side, timm_name, token_widths
from distill.weights import load_weights, stated_origin, tensors_sha256
from pipeline.batch import normalise

LOCAL_DIR = "local-dir:"


class FrozenTeacher:
    """A frozen model that turns global crops into `TeacherTargets`.

    Attributes:
        model: the timm model, eval mode, no gradient.
        arch: its name in timm, with the tag of released weights.
        embed_dim: width of its tokens.
        dtype: compute dtype, bf16 on CUDA and fp32 on the CPU unless given.
        img_size: side of the crops in pixels.
        input_size: side at which the model sees them: the nearest that its patches divide, so that all is seen.
    """

    def __init__(
        self,
        model: Any,
        *,
        arch: str,
        img_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.model: Any = _cast(model, device, dtype).eval().requires_grad_(False)
        self.arch = arch
        self.img_size = img_size
        self.input_size = _input_size(self.model, img_size)
        self.dtype = dtype
        self.device = device
        self.embed_dim, patch_width = token_widths(self.model)
        if self.embed_dim != patch_width:
            raise UserError(
                f"teacher {arch}: its pooled features are {self.embed_dim} wide and its last map {patch_width}. "
                "Choose a teacher whose class and patch tokens have one width."
            )
        self.mean: tuple[float, float, float] = tuple(self.model.pretrained_cfg["mean"])
        self.std: tuple[float, float, float] = tuple(self.model.pretrained_cfg["std"])
        self._tokens: Callable[[Tensor], tuple[Tensor, Tensor]] = self._forward

    def compile(self, backend: str = "inductor") -> None:
        """Compile the forward pass for the one crop size it will see."""
        self._tokens = torch.compile(self._forward, backend=backend, fullgraph=True, dynamic=False)

    def num_patches(self) -> int:
        """Return the number of patch tokens of one crop."""
        return (self.input_size // patch_side(self.model)) ** 2

    @torch.no_grad()
    def __call__(self, crops: UInt8[Tensor, "gb G G 3"], num_crops: int = 2) -> TeacherTargets:
        """Return the final-norm tokens of `num_crops` crops of each image.

        Args:
            crops: uint8 [num_crops * b, G, G, 3], crop-major, undistorted.
            num_crops: global crops of an image.

        Returns:
            Image-major targets in `dtype`: cls [b, num_crops, d], patches [b, num_crops, n, d].
        """
        if crops.shape[1:3] != (self.img_size, self.img_size):
            raise UserError(
                f"teacher {self.arch}: crops of {tuple(crops.shape[1:3])} pixels, it was made for {self.img_size}. "
                "Give the teacher and the loader the same global_crops_size."
            )
        return TeacherTargets(*(x.unflatten(0, (num_crops, -1)).transpose(0, 1) for x in self._tokens(crops)))

    def _forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        images = normalise(crops, mean=self.mean, std=self.std, dtype=self.dtype)
        if self.input_size != self.img_size:
            images = F.interpolate(images, size=(self.input_size,) * 2, mode="bilinear", antialias=True)
        return cls_and_patches(self.model, images)

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides this teacher's outputs on given crops; a cache with another one is refused."""
        rope = dinov3_rope(self.model)
        return {
            "architecture": self.arch,
            "state_dict_sha256": tensors_sha256(self.model.state_dict()),
            "feature_point": "final-norm cls token and patch tokens",
            "dtype": str(self.dtype).removeprefix("torch."),
            "img_size": self.img_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "rope_periods": rope.periods.tolist() if rope else None,
        } | ({"input_size": self.input_size} if self.input_size != self.img_size else {})


def load_teacher(
    config: TeacherConfig, *, img_size: int, device: torch.device, dtype: torch.dtype | None = None
) -> FrozenTeacher:
    """Load the frozen teacher from the hub by name, from a local file or from a local folder.

    Args:
        config: `teacher_arch` and `teacher_pretrained_weights`.
        img_size: side of the global crops in pixels.
        device: where it runs.
        dtype: compute dtype; bf16 on CUDA and fp32 on the CPU by default.

    Raises:
        UserError: unknown architecture, unreadable configuration or weights, or keys and shapes that do not fit.
    """
    arch, weights = config.teacher_arch, config.teacher_pretrained_weights
    try:
        # A fixed image size makes timm compute the RoPE table once, not at every forward pass.
        model = _create(arch, img_size, pretrained=weights is None)
        if _input_size(model, img_size) != img_size:
            model = _create(arch, _input_size(model, img_size), pretrained=weights is None)
    except OSError as error:
        raise UserError(
            f"--teacher_arch {arch}: its weights could not be found or downloaded "
            f"({str(error).partition(chr(10))[0]}). "
            "Give a local file with --teacher_pretrained_weights (Meta's .pth or timm's .safetensors), or an existing "
            "local-dir:FOLDER."
        ) from error
    except UserError:
        raise
    except (KeyError, ValueError) as error:
        raise UserError(
            f"--teacher_arch {arch}: timm finds no model there ({error!r}). A folder or hub name must have timm's "
            "config.json; for Hugging Face's, give timm's name of the architecture here and the folder as "
            "--teacher_pretrained_weights."
        ) from error
    periods = None if weights is None else load_weights(model, weights)
    origin = (stated_origin(weights) if weights else {}) or model.pretrained_cfg
    if rope := dinov3_rope(model):
        # Meta released DINOv3 with periods rounded to bf16. Its files hold them; other containers of released weights
        # have timm's tag of the release, which a model that Firn trained has not.
        if periods is None and origin.get("tag"):
            periods = rope.periods.bfloat16()
        if periods is not None:
            rope.periods.copy_(periods)
    for key, value in [*model.state_dict().items(), *model.named_buffers()]:
        if not bool(torch.isfinite(value).all()):
            raise UserError(
                f"{weights or arch}: {key} holds NaN or Inf. The file is damaged: copy or download it again."
            )
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    name = ".".join(filter(None, (model.pretrained_cfg["architecture"], origin.get("tag"))))
    return FrozenTeacher(model, arch=name, img_size=img_size, dtype=dtype, device=device)


def load_teacher_of(config: TeacherConfig, cached: Mapping[str, Any], *, device: torch.device) -> FrozenTeacher:
    """Load the teacher that a configuration names, in fp32, and check that its weights are those of a cache's teacher.

    Its name and place do not matter: a folder may have been renamed or copied since.

    Args:
        config: `teacher_arch` and `teacher_pretrained_weights`.
        cached: fingerprint of the cache's teacher.
        device: where it runs.

    Raises:
        UserError: it cannot be loaded, or is another one.
    """
    teacher = load_teacher(config, img_size=cached["img_size"], device=device, dtype=torch.float32)
    dtype = getattr(torch, cached["dtype"])
    state = {name: x.to(dtype) if x.is_floating_point() else x for name, x in teacher.model.state_dict().items()}
    if tensors_sha256(state) != cached["state_dict_sha256"]:
        raise UserError(_another(config, f"{teacher.arch} with other weights", cached))
    return teacher


def check_named_teacher(config: TeacherConfig, cached: Mapping[str, Any]) -> None:
    """Check that a teacher that is named beside a cache is the cache's; the default counts as not named.

    timm's names are compared with the cache's, whatever is local or on a hub is loaded: there the weights decide.

    Raises:
        UserError: it is another one, or cannot be loaded.
    """
    arch, weights = config.teacher_arch, config.teacher_pretrained_weights
    if arch == DEFAULT_TEACHER and weights is None:
        return
    if ":" in arch or weights is not None:
        try:
            load_teacher_of(config, cached, device=torch.device("cpu"))
        except UserError as error:
            raise UserError(f"{error} The cache names its teacher: --teacher_arch may be left out.") from error
        return
    name = timm_name(arch)
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    named = ".".join(filter(None, (known.architecture, known.tag))) if known else arch
    if named != cached["architecture"]:
        raise UserError(_another(config, named, cached))


def _another(config: TeacherConfig, found: str, cached: Mapping[str, Any]) -> str:
    return (
        f"--teacher_arch {config.teacher_arch}: that is {found}, and the cache is of {cached['architecture']}, weights "
        f"sha256 {cached['state_dict_sha256'][:12]}. Leave the flag out or name the cache's teacher, or build another "
        "cache."
    )


def _create(arch: str, img_size: int, *, pretrained: bool) -> Any:
    vit_args = {"img_size": img_size, "dynamic_img_size": False}
    return create_backbone(arch, pretrained=pretrained, vit_args=vit_args)


def _input_size(model: Any, img_size: int) -> int:
    patch = patch_side(model)
    return max(round(img_size / patch), 1) * patch


def _cast(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move a model to a device and dtype with RoPE's own periods and its table in fp32, which a cast would round.

    With the periods of Meta's release, timm's DINOv3 equals Meta's code to the bit.
    """
    rope = dinov3_rope(model)
    periods = rope.periods.to(device, copy=True) if rope else None
    model = model.to(device=device, dtype=dtype)
    if periods is not None:
        rope.register_buffer("periods", periods, persistent=False)
        if rope.feat_shape is not None:
            table = rope._create_embed(rope.feat_shape, no_aug=True)
            rope.register_buffer("pos_embed_cached", table, persistent=False)
    return model


@dataclass(frozen=True)
class TeacherTargets:
    """Final-norm tokens of the frozen teacher on the global crops of `b` images, image-major.

    Attributes:
        cls: cls tokens, [b, g, d].
        patches: patch tokens, [b, g, n, d]; class and register tokens left out.
    """

    cls: Float[Tensor, "b g d"]
    patches: Float[Tensor, "b g n d"]

    def on_grid(self, num_patches: int) -> TeacherTargets:
        """Return the same with patch tokens on a square grid of another number of patches over the same pixels.

        Bilinear, antialiased where the grid becomes coarser; in fp32, then in the tokens' dtype.
        """
        b, g, n, d = self.patches.shape
        if n == num_patches:
            return self
        old, new = math.isqrt(n), math.isqrt(num_patches)
        assert old * old == n and new * new == num_patches, (n, num_patches)
        grid = self.patches.flatten(0, 1).unflatten(1, (old, old)).movedim(-1, 1).float()  # [b*g, d, old, old]
        resampled = F.interpolate(grid, size=(new, new), mode="bilinear", antialias=True)
        patches = resampled.movedim(1, -1).reshape(b, g, num_patches, d).to(self.patches.dtype)
        return TeacherTargets(self.cls, patches)
