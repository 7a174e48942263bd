"""Parameter groups, the finite guard and the EMA."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill.config import OptimConfig
from distill.optim import StudentEma, clip_gradients, create_optimizer, set_lr, skip_update
from distill.step import DistillStep, StepInputs, StepScalars

MakeStep = Callable[..., DistillStep]


def group_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, object]:
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


def test_groups_carry_layer_decay_the_patch_embeddings_rate_and_no_decay_on_vectors(make_step: MakeStep) -> None:
    step = make_step()
    optimizer = create_optimizer(step, OptimConfig(layer_decay=0.5, patch_embed_lr_scale=0.2))
    student = step.student
    expected = {
        student.blocks[2].mlp.fc1.weight: (1.0, 0.04),
        student.blocks[0].mlp.fc1.weight: (0.25, 0.04),
        student.blocks[0].mlp.fc1.bias: (0.25, 0.0),
        student.blocks[0].gamma_1: (0.25, 0.0),
        student.patch_embed.proj.weight: (0.125 * 0.2, 0.04),
        student.patch_embed.proj.bias: (0.125 * 0.2, 0.0),
        student.cls_token: (0.125, 0.0),
        student.reg_token: (0.125, 0.0),
        student.norm.weight: (1.0, 0.0),
        step.cls_head.projection.weight: (1.0, 0.04),
        step.cls_head.projection.bias: (1.0, 0.0),
    }
    for parameter, (scale, decay) in expected.items():
        group = group_of(optimizer, parameter)
        assert (group["lr_scale"], group["weight_decay"]) == (pytest.approx(scale), decay)
    grouped = sum(len(g["params"]) for g in optimizer.param_groups)
    assert grouped == sum(p.requires_grad for p in step.parameters())
    set_lr(optimizer, 0.1)
    assert group_of(optimizer, student.patch_embed.proj.weight)["lr"] == pytest.approx(0.0025)


def stepped(step: DistillStep, inputs: StepInputs, poison: str | None) -> tuple[DistillStep, float]:
    optimizer = create_optimizer(step, OptimConfig())
    set_lr(optimizer, 1e-3)
    loss, metrics = step(*inputs, *StepScalars(torch.tensor(0.05), torch.tensor(0.05), torch.tensor(0.0)))
    loss.backward()
    if poison == "gradient":
        step.student.blocks[1].attn.qkv.weight.grad[3, 3] = float("inf")
    value = metrics[0] * float("nan") if poison == "loss" else metrics[0]
    _, flag = clip_gradients(step.parameters(), 3.0, value)
    skip_update(optimizer, flag)
    optimizer.step()
    return step, flag.item()


@pytest.mark.parametrize("poison", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_no_weight(make_step: MakeStep, inputs: StepInputs, poison: str) -> None:
    before = copy.deepcopy(make_step().state_dict())
    step, flag = stepped(make_step(), inputs, poison)
    assert flag == 1
    assert all(torch.equal(before[name], value) for name, value in step.state_dict().items())


def test_a_finite_step_changes_every_trained_weight_and_no_buffer(make_step: MakeStep, inputs: StepInputs) -> None:
    before = copy.deepcopy(make_step().state_dict())
    step, flag = stepped(make_step(), inputs, None)
    assert flag == 0
    trained = {name for name, p in step.named_parameters() if p.requires_grad}
    for name, value in step.state_dict().items():
        assert torch.equal(before[name], value) == (name not in trained), name


def test_clipping_scales_to_the_limit_and_reports_the_norm_before(make_step: MakeStep) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(4))]
    parameters[0].grad, parameters[1].grad = torch.full((3,), 3.0), torch.full((4,), 3.0)
    norm, _ = clip_gradients(parameters, 1.0, torch.zeros(()))
    assert norm.item() == pytest.approx(63**0.5)
    assert torch.cat([p.grad for p in parameters]).norm().item() == pytest.approx(1.0, rel=1e-5)
    norm, _ = clip_gradients(parameters, 0.0, torch.zeros(()))
    assert norm.item() == pytest.approx(1.0, rel=1e-5)
    assert torch.cat([p.grad for p in parameters]).norm().item() == pytest.approx(1.0, rel=1e-5)


def test_the_ema_is_the_weighted_mean_of_the_students(make_step: MakeStep) -> None:
    student = make_step().student
    ema = StudentEma(student)
    first = student.blocks[0].mlp.fc1.weight.detach().clone()
    with torch.no_grad():
        student.blocks[0].mlp.fc1.weight.add_(1.0)
    ema.update(student, 0.75)
    torch.testing.assert_close(ema.model.blocks[0].mlp.fc1.weight, first + 0.25)
    torch.testing.assert_close(student.blocks[0].mlp.fc1.weight.detach(), first + 1.0)
