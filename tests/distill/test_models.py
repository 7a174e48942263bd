"""The packed pass against timm's own forward, and what cannot be packed."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from common.errors import UserError
from distill import models
from distill.config import StudentConfig
from distill.models import (
    check_plain_student,
    cls_and_patches,
    create_backbone,
    create_student,
    is_packable,
    packed_tokens,
    rope_table,
    token_widths,
)

# One fp32 forward and backward in two orders of summation over at most 300 tokens of O(1) values.
FP32_NOISE = {"rtol": 2e-4, "atol": 2e-5}


@pytest.mark.parametrize(
    ("arch", "patch"),
    [("vit_small", 8), ("vit_tiny", 8), ("vit_small_plus_patch16_dinov3", 16)],  # the last one with SwiGLU
)
def test_packed_pass_equals_one_timm_pass_per_size_in_values_and_gradients(
    student_config: StudentConfig, arch: str, patch: int
) -> None:
    model = create_student(dataclasses.replace(student_config, arch=arch, patch_size=patch), seed=3)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # norms and biases that do nothing would hide errors in them
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    crops = [torch.randn(b, 3, side * patch, side * patch, generator=generator) for b, side in ((3, 6), (5, 3))]
    packed = packed_tokens(model, crops, [rope_table(model, 6 * patch), rope_table(model, 3 * patch)])
    separate = [model.forward_features(x) for x in crops]
    for a, b in zip(packed, separate, strict=True):
        assert_close(a, b, **FP32_NOISE)

    def gradients(tokens: list[torch.Tensor]) -> list[torch.Tensor]:
        model.zero_grad()
        sum((t.square() * torch.linspace(0.5, 1, t.shape[-1])).sum() for t in tokens).backward()
        return [p.grad.clone() for p in model.parameters()]

    for (name, _), a, b in zip(model.named_parameters(), gradients(packed), gradients(separate), strict=True):
        scale = b.norm() + 1e-6
        assert (a - b).norm() / scale < 1e-4, name


@pytest.mark.parametrize(("layer_scale", "in_fp32"), [(1.0, True), (1e-5, True), (1.0, False)])
def test_a_packed_pass_in_bf16_has_no_larger_errors_than_timms(
    student_config: StudentConfig, layer_scale: float, in_fp32: bool
) -> None:
    model = create_student(dataclasses.replace(student_config, layer_scale=layer_scale), seed=3)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        size = 0.3 * layer_scale if "gamma" in name else 0.05
        parameter.data.add_(size * torch.randn(parameter.shape, generator=generator))
    crops = [torch.randn(3, 3, 48, 48, generator=generator), torch.randn(5, 3, 24, 24, generator=generator)]
    weights = [torch.randn(b, t, 64, generator=generator) for b, t in ((3, 41), (5, 14))]

    def gradients(packed: bool, exact: bool = False) -> list[torch.Tensor]:
        judged = copy.deepcopy(model).double() if exact else model
        images = [x.double() for x in crops] if exact else crops
        judged.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not exact):
            if packed:
                ropes = [rope_table(judged, 48), rope_table(judged, 24)]
                tokens = packed_tokens(judged, images, ropes, residual_in_fp32=in_fp32)
            else:
                tokens = [judged.forward_features(x) for x in images]
        sum((t * w).sum() for t, w in zip(tokens, weights, strict=True)).backward()
        return [p.grad.double() for p in judged.parameters()]

    exact = gradients(packed=False, exact=True)
    errors = [
        torch.stack([(a - b).norm() / b.norm() for a, b in zip(gradients(packed), exact, strict=True)])
        for packed in (True, False)
    ]
    # Both round the same sums at other places: the errors are alike over some 50 parameters. A stream in bf16 rounds
    # at each of six more additions, to 2^-9 of all that was added before.
    more = 1.0 if in_fp32 else 2.5
    assert errors[0].median() <= 1.25 * more * errors[1].median()
    assert errors[0].max() <= 1.5 * more * errors[1].max()
    assert in_fp32 or errors[0].median() > 1.1 * errors[1].median()


def test_one_attention_over_packed_crops_of_several_sizes_is_that_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 7), (4, 2), (1, 5)]
    qkv = torch.randn(3, sum(b * t for b, t in shapes), 2, 8, generator=generator)
    expected = models._attend(*qkv, shapes)

    def by_bounds(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, starts_k: Tensor, *longest: int) -> Tensor:
        """What `varlen_attn` documents; its kernel needs a GPU."""
        assert longest == (7, 7) and starts.dtype == starts_k.dtype == torch.int32
        out = torch.empty_like(q)
        for a, b in itertools.pairwise(starts.tolist()):
            scores = torch.einsum("qhe,khe->hqk", q[a:b], k[a:b]) / 8**0.5
            out[a:b] = torch.einsum("hqk,khe->qhe", scores.softmax(-1), v[a:b])
        return out

    monkeypatch.setattr(models, "_has_varlen", lambda v: True)
    monkeypatch.setattr(models, "varlen_attn", by_bounds)
    assert_close(models._attend(*qkv, shapes), expected, **FP32_NOISE)


def test_masked_patches_do_not_reach_the_tokens(student_config: StudentConfig) -> None:
    model = create_student(student_config, seed=3).eval()
    crops = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 36, dtype=torch.bool)
    mask[:, :6] = True  # the top row of patches
    changed = crops.clone()
    changed[:, :, :8] += 1.0
    rope, token = [rope_table(model, 48)], torch.full((64,), 0.3)
    first = packed_tokens(model, [crops], rope, masks=[mask], mask_token=token)[0]
    second = packed_tokens(model, [changed], rope, masks=[mask], mask_token=token)[0]
    assert torch.equal(first, second)
    unmasked = packed_tokens(model, [crops], rope)[0]
    assert not torch.allclose(first, unmasked)


def test_drop_path_of_a_packed_pass_drops_whole_crops(student_config: StudentConfig) -> None:
    config = dataclasses.replace(student_config, depth=2, drop_path_rate=0.9)
    model = create_student(config, seed=3).train()
    crops = torch.randn(1, 3, 48, 48).expand(64, -1, -1, -1)
    torch.manual_seed(0)
    cls = packed_tokens(model, [crops], [rope_table(model, 48)])[0][:, 0].detach()
    # Equal crops differ only by which of the last block's two branches each one dropped: at most 4 outcomes.
    assert 2 <= len(torch.unique(cls.mul(1e4).round(), dim=0)) <= 4


def test_the_default_student_is_vit_small_with_21_6_million_parameters() -> None:
    student = create_student(StudentConfig(), seed=0)
    assert sum(p.numel() for p in student.parameters()) == 21_586_944
    assert student.num_prefix_tokens == 5


def test_the_seed_decides_the_initial_weights_and_leaves_the_global_generator_alone(
    student_config: StudentConfig,
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, third = (create_student(student_config, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.patch_embed.proj.weight, second.patch_embed.proj.weight)
    assert not torch.equal(first.patch_embed.proj.weight, third.patch_embed.proj.weight)


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(UserError, match="vit_smal: timm cannot create it"):
        create_backbone("vit_smal")


# timm's name, patch side, pixels of a small and a large crop, widths of cls and patch tokens.
PLAIN = [
    ("vit_tiny_patch16_224", 16, (48, 32), (192, 192)),  # absolute positions
    ("vit_pwee_patch16_reg1_gap_256", 16, (48, 32), (256, 256)),  # registers, no class token: pooled
    ("deit3_small_patch16_224", 16, (48, 32), (384, 384)),  # positions of the patches alone, LayerScale
    ("vit_dwee_patch16_reg1_gap_256", 16, (48, 32), (256, 256)),  # differential attention
    ("eva02_tiny_patch14_224", 14, (56, 28), (192, 192)),  # RoPE and absolute positions
    ("swin_tiny_patch4_window7_224", 32, (96, 64), (768, 768)),  # a map with the channels last
    ("convnext_atto", 32, (96, 64), (320, 320)),
    ("resnet18", 32, (96, 64), (512, 512)),
    ("densenet121", 32, (96, 64), (1024, 1024)),  # takes no drop path
    ("mobilenetv3_small_050", 32, (96, 64), (288, 1024)),  # a layer between map and pooled features
]


@pytest.mark.parametrize(("arch", "patch", "sizes", "widths"), PLAIN, ids=[row[0] for row in PLAIN])
def test_other_timm_models_give_the_tokens_of_timms_own_forward(
    arch: str, patch: int, sizes: tuple[int, int], widths: tuple[int, int]
) -> None:
    model = create_student(StudentConfig(arch=arch, patch_size=patch), seed=0).eval()
    check_plain_student(model, sizes, arch=arch, masks=False)
    assert not is_packable(model)
    for size in sizes:
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        cls, patches = cls_and_patches(model, images)
        assert patches.shape[1] == (size // patch) ** 2
        assert (cls.shape[1], patches.shape[2]) == token_widths(model)
        # What a user of timm gets of a model without a classifier.
        assert_close(cls, model(images), rtol=0, atol=0)
        features = model.forward_intermediates(images, indices=1, intermediates_only=True, norm=patches.ndim == 3)[0]
        assert_close(patches, features.flatten(2).mT, rtol=1e-5, atol=1e-5)


def test_a_student_of_the_family_has_equal_tokens_packed_and_plain(student_config: StudentConfig) -> None:
    model = create_student(student_config, seed=3).eval()
    crops = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    packed = packed_tokens(model, [crops], [rope_table(model, 48)])[0]
    cls, patches = cls_and_patches(model, crops)
    assert is_packable(model)
    assert_close(cls, packed[:, 0], **FP32_NOISE)
    assert_close(patches, packed[:, 5:], **FP32_NOISE)


def test_a_patch_size_that_is_not_the_architectures_is_refused_with_the_right_one() -> None:
    with pytest.raises(UserError, match=r"its patches are 32 pixels wide. Give --patch_size 32"):
        create_student(StudentConfig(arch="resnet18"), seed=0)


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "convnext_atto"])
def test_masks_are_refused_for_a_student_that_cannot_be_packed(arch: str) -> None:
    with pytest.raises(UserError, match=f"{arch}: masks of the student's input need the packed pass"):
        check_plain_student(torch.nn.Identity(), (48,), arch=arch, masks=True)


def test_a_model_whose_features_are_no_tokens_is_refused() -> None:
    arch = "crossvit_tiny_240"  # two sequences of tokens
    model = create_student(StudentConfig(arch=arch, patch_size=17), seed=0)
    with pytest.raises(UserError, match=f"{arch}.*Choose another student"):
        check_plain_student(model, (51,), arch=arch, masks=False)


def test_a_model_of_one_input_size_is_refused_for_crops_of_another() -> None:
    arch = "mixer_s32_224"
    model = create_student(StudentConfig(arch=arch, patch_size=32), seed=0)
    check_plain_student(model, (224,), arch=arch, masks=False)
    with pytest.raises(UserError, match=f"{arch}: it does not take crops of 96 pixels"):
        check_plain_student(model, (224, 96), arch=arch, masks=False)
