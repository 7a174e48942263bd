"""The packed pass against timm's own forward, and what cannot be packed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from common.errors import UserError
from distill.config import StudentConfig
from distill.models import create_student, create_vit, packed_tokens, rope_table

# One fp32 forward and backward in two orders of summation over at most 300 tokens of O(1) values.
FP32_NOISE = {"rtol": 2e-4, "atol": 2e-5}


@pytest.mark.parametrize("arch", ["vit_small", "vit_tiny"])
def test_packed_pass_equals_one_timm_pass_per_size_in_values_and_gradients(
    student_config: StudentConfig, arch: str
) -> None:
    model = create_student(dataclasses.replace(student_config, arch=arch), seed=3)
    generator = torch.Generator().manual_seed(0)
    crops = [torch.randn(3, 3, 48, 48, generator=generator), torch.randn(5, 3, 24, 24, generator=generator)]
    packed = packed_tokens(model, crops, [rope_table(model, 48), rope_table(model, 24)])
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


def test_masked_patches_do_not_reach_the_tokens(student_config: StudentConfig) -> None:
    model = create_student(student_config, seed=3).eval()
    crops = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 36, dtype=torch.bool)
    mask[:, :6] = True  # the top row of patches
    changed = crops.clone()
    changed[:, :, :8] += 1.0
    rope, token = [rope_table(model, 48)], torch.full((64,), 0.3)
    first = packed_tokens(model, [crops], rope, mask=mask, mask_token=token)[0]
    second = packed_tokens(model, [changed], rope, mask=mask, mask_token=token)[0]
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
        create_vit("vit_smal")


def test_a_model_without_class_token_is_refused() -> None:
    with pytest.raises(UserError, match=r"class token|cannot create"):
        create_vit("resnet18")


def test_a_student_that_cannot_be_packed_is_refused() -> None:
    with pytest.raises(UserError, match="the student must be a timm Eva ViT with RoPE"):
        create_student(StudentConfig(arch="vit_tiny_patch16_224"), seed=0)
