"""The distillation step: its terms, its gradients compiled and eager, its behaviour under autocast."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from common.errors import UserError
from distill import gradients, losses
from distill.config import PRESETS, LossConfig, RuntimeConfig, StudentConfig, preset
from distill.gradients import check_compiled_gradients, term_gradient_norms
from distill.prototypes import Prototypes
from distill.runtime import configure_torch
from distill.step import METRIC_NAMES, TERMS, DistillStep, StepInputs, StepScalars
from kernels.spd import log_euclidean_loss, spd_logm, token_spd
from pipeline.batch import normalise

MakeStep = Callable[..., DistillStep]
# Two fp32 evaluations of the same sums of at most 2,304 terms of O(1), in another order.
FP32_NOISE = {"rtol": 2e-4, "atol": 1e-5}


def test_terms_equal_the_losses_of_timms_own_forward_image_by_image(
    make_step: MakeStep, inputs: StepInputs, scalars: StepScalars, prototypes: Prototypes
) -> None:
    step = make_step()
    terms, _ = step.terms(inputs, scalars)
    b = inputs.teacher_cls.shape[0]
    global_tokens = step.student.forward_features(normalise(inputs.global_crops))
    local_tokens = step.student.forward_features(normalise(inputs.local_crops))
    cls = torch.cat([global_tokens[:, 0], local_tokens[:, 0]])
    patches = global_tokens[:, 5:]

    def teacher_probs(tokens: Tensor, bank: object, temperature: Tensor) -> Tensor:
        unit = F.normalize(tokens - bank.mean, dim=-1)
        return torch.softmax((unit @ bank.weight.T - bank.centre) / temperature, -1)

    def student_logits(tokens: Tensor, head: object, bank: object) -> Tensor:
        return F.normalize(head.projection(tokens) - bank.mean, dim=-1) @ bank.weight.T

    views = student_logits(cls, step.cls_head, prototypes.cls).view(-1, b, 32)
    targets = teacher_probs(inputs.teacher_cls, prototypes.cls, scalars[0])  # [b, g, k]
    pairs = [
        -(targets[i, t] * torch.log_softmax(views[s, i] / 0.1, 0)).sum()
        for i in range(b) for t in range(2) for s in range(len(views)) if s != t
    ]  # fmt: skip
    assert_close(terms["dino"], torch.stack(pairs).mean(), **FP32_NOISE)

    crops = []
    for view in range(2):
        for i in range(b):
            row = view * b + i
            masked = inputs.masks[row].nonzero().flatten()
            if len(masked):
                logits = student_logits(patches[row, masked], step.patch_head, prototypes.patch)
                probs = teacher_probs(inputs.teacher_patches[i, view, masked], prototypes.patch, scalars[1])
                crops.append(-(probs * torch.log_softmax(logits / 0.1, -1)).sum(-1).mean())
    assert len(crops) == b
    assert_close(terms["ibot"], torch.stack(crops).sum() / (2 * b), **FP32_NOISE)

    teacher_cls = torch.cat([inputs.teacher_cls[:, 0], inputs.teacher_cls[:, 1]])
    projected = step.cls_head.projection(cls[: 2 * b])
    mean = prototypes.cls.mean
    assert_close(terms["cls"], losses.cls_loss(projected - mean, teacher_cls - mean), **FP32_NOISE)
    koleo = losses.koleo_loss(cls[None, :b]) + losses.koleo_loss(cls[None, b : 2 * b])
    assert_close(terms["koleo"], koleo, rtol=1e-3, atol=1e-4)  # log of distances near 0: noise over the distance
    teacher_log = spd_logm(token_spd(torch.cat([inputs.teacher_patches[:, 0], inputs.teacher_patches[:, 1]])))
    assert_close(terms["spd"], log_euclidean_loss(patches, teacher_log), **FP32_NOISE)


def test_the_loss_is_the_weighted_sum_of_the_logged_terms(
    make_step: MakeStep, inputs: StepInputs, scalars: StepScalars
) -> None:
    weights = LossConfig(2.0, 0.5, 0.25, 3.0, 1.5, patch_loss_weight=0.7, mse_loss_weight=0.3, gram_loss_weight=0.2)
    weights = dataclasses.replace(weights, softmax_gram_loss_weight=0.1, proteus_loss_weight=0.4)
    loss, metrics = make_step(weights)(*inputs, *scalars._replace(koleo_scale=torch.tensor(0.5)))
    named = dict(zip(METRIC_NAMES, metrics.tolist(), strict=True))
    expected = sum(named[t] * getattr(weights, f"{t}_loss_weight") * (0.5 if t == "koleo" else 1) for t in TERMS)
    assert all(named[t] != 0 for t in TERMS)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert named["loss"] == loss.item()
    assert named["dino"] == pytest.approx(named["dino_entropy"] + named["dino_kl"], rel=1e-6)
    # Half of the crops are masked: the entropy and the divergence are those of a masked patch.
    assert 2 * named["ibot"] == pytest.approx(named["ibot_entropy"] + named["ibot_kl"], rel=1e-6)
    assert 1 < named["target_usage"] <= 32
    assert 1 < named["student_usage"] <= 32


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_trainable_parameter_gets_a_gradient_in_every_preset(
    make_step: MakeStep, inputs: StepInputs, scalars: StepScalars, name: str, head: str
) -> None:
    weights = preset(name).losses
    step = make_step(weights, head=head)
    loss, metrics = step(*inputs, *scalars)
    loss.backward()
    silent = [n for n, p in step.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []
    named = dict(zip(METRIC_NAMES, metrics.tolist(), strict=True))
    for term in TERMS:
        assert (named[term] != 0) == bool(getattr(weights, f"{term}_loss_weight")), term


def test_a_masked_student_input_changes_the_student_and_trains_the_mask_token(
    make_step: MakeStep, inputs: StepInputs, scalars: StepScalars
) -> None:
    masked, plain = make_step(mask_student_input=True), make_step()
    loss, _ = masked(*inputs, *scalars)
    loss.backward()
    assert masked.mask_token.grad.norm() > 0
    assert not plain.mask_token.requires_grad
    assert loss.item() != plain(*inputs, *scalars)[0].item()
    assert "mask_token" not in masked.student.state_dict()


def test_no_local_crops_is_a_plain_two_view_loss(make_step: MakeStep, inputs: StepInputs, scalars: StepScalars) -> None:
    step = make_step()
    none = inputs._replace(local_crops=inputs.local_crops[:0])
    terms, _ = step.terms(none, scalars)
    with_locals, _ = step.terms(inputs, scalars)
    assert_close(terms["spd"], with_locals["spd"], **FP32_NOISE)
    assert terms["dino"].item() != with_locals["dino"].item()


def compiled(step: DistillStep, backend: str) -> DistillStep:
    torch._dynamo.reset()
    step.compile(backend=backend, fullgraph=True, dynamic=False)
    return step


def test_the_step_is_one_graph_with_the_gradients_of_the_eager_step(
    make_step: MakeStep, inputs: StepInputs, scalars: StepScalars
) -> None:
    configure_torch(RuntimeConfig(), torch.device("cpu"))
    check_compiled_gradients(compiled(make_step(), "aot_eager"), inputs, scalars, autocast=False)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_inductors_gradients_are_those_of_the_eager_step(
    make_step: MakeStep, inputs: StepInputs, scalars: StepScalars, autocast: bool
) -> None:
    configure_torch(RuntimeConfig(), torch.device("cpu"))
    check_compiled_gradients(compiled(make_step(autocast=autocast), "inductor"), inputs, scalars, autocast=autocast)


def test_the_eager_step_of_the_gate_keeps_little_memory_and_the_same_gradients(
    make_step: MakeStep, inputs: StepInputs, scalars: StepScalars
) -> None:
    step = make_step(depth=6, drop_path_rate=0.3)
    found = []
    for recomputing in (contextlib.nullcontext(), gradients._recomputing(step.student)):
        kept: dict[int, int] = {}

        def keep(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        torch.manual_seed(0)
        with recomputing, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss, _ = step(*inputs, *scalars)
            held = sum(kept.values())
            loss.backward()
        found.append((held, [p.grad.clone() for p in step.parameters() if p.grad is not None]))
        step.zero_grad()
    assert found[1][0] < 0.5 * found[0][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert not step.student.grad_checkpointing


def test_the_gradient_gate_names_the_parameter_whose_compiled_gradient_is_wrong(
    make_step: MakeStep, inputs: StepInputs, scalars: StepScalars, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_step()
    honest = gradients._gradients

    def wrong(step_: DistillStep, call: object, *args: object) -> dict[str, Tensor]:
        result = honest(step_, call, *args)
        if call is step:
            result["student.blocks.1.mlp.fc1.weight"] *= 1.01
        return result

    monkeypatch.setattr(gradients, "_gradients", wrong)
    with pytest.raises(UserError, match=r"compiled gradient of student\.blocks\.1\.mlp\.fc1\.weight is off by 0\.0"):
        check_compiled_gradients(step, inputs, scalars, autocast=False)


def test_autocast_stays_around_backbone_and_heads(
    make_step: MakeStep, inputs: StepInputs, scalars: StepScalars
) -> None:
    exact, _ = make_step().terms(inputs, scalars)
    mixed, _ = make_step(autocast=True).terms(inputs, scalars)
    assert all(value.dtype == torch.float32 for value in mixed.values())
    # bf16 activations carry 2^-9 relative error each; after 3 blocks and division by a temperature of 0.1
    # the logits are off by about 10 * 2^-8.
    for name in ("dino", "ibot", "cls", "spd"):
        assert abs(mixed[name].item() - exact[name].item()) < 0.05, name


def test_gradients_by_term_are_the_gradients_of_each_term_alone(
    make_step: MakeStep, inputs: StepInputs, scalars: StepScalars
) -> None:
    step = make_step()
    norms = term_gradient_norms(step, inputs, scalars)
    assert set(norms) == {"dino", "ibot", "koleo", "cls", "spd"}
    only_spd = dataclasses.replace(preset("regression").losses, mse_loss_weight=0.0, spd_loss_weight=1.0)
    alone = make_step(only_spd)
    alone(*inputs, *scalars)[0].backward()
    squares = [p.grad.square().sum() for p in alone.student.parameters() if p.grad is not None]
    assert norms["spd"] == pytest.approx(torch.stack(squares).sum().sqrt().item(), rel=1e-4)
    assert all(p.grad is None for p in step.parameters())


@pytest.mark.parametrize("number", [2, 3])
def test_micro_batches_are_the_images_of_the_batch_with_their_masks(inputs: StepInputs, number: int) -> None:
    b, n = inputs.teacher_cls.shape[0], inputs.masks.shape[1]
    size = b // number
    for i, part in enumerate(inputs.micro_batches(number)):
        images = range(i * size, (i + 1) * size)
        for view in range(2):
            for j, image in enumerate(images):
                assert torch.equal(part.global_crops[view * size + j], inputs.global_crops[view * b + image])
                assert torch.equal(part.masks[view * size + j], inputs.masks[view * b + image])
        for view in range(4):
            assert torch.equal(part.local_crops[view * size], inputs.local_crops[view * b + images[0]])
        assert torch.equal(part.teacher_patches, inputs.teacher_patches[images[0] : images[-1] + 1])
        assert torch.equal(part.masked_indices, part.masks.flatten().nonzero().flatten())
        assert len(part.masked_indices) * number == len(inputs.masked_indices)
        assert part.masks.shape == (2 * size, n)


def test_more_than_256_patches_are_reduced_alike_for_student_and_teacher(
    make_step: MakeStep, prototypes: Prototypes, student_config: StudentConfig
) -> None:
    weights = dataclasses.replace(preset("regression").losses, mse_loss_weight=0.0, spd_loss_weight=1.0)
    step = make_step(weights)
    big = DistillStep(
        step.student, prototypes, student_config, weights,
        student_temp=0.1, global_crops_size=160, local_crops_size=24, autocast=False,
    )  # fmt: skip
    crops = torch.randint(0, 256, (2, 160, 160, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        teacher = step.student.forward_features(normalise(crops))[None, :, 5:]  # the student's own tokens
        terms = big._token_terms(teacher[:, :, 0], teacher[0], teacher[0])
        doubled = big._token_terms(teacher[:, :, 0], teacher[0], teacher[0].flip(1))
    fewer = dataclasses.replace(weights, spd_max_tokens=64)
    big.weights = fewer
    pooled = big._token_terms(teacher[:, :, 0], teacher[0], teacher[0].flip(1))["spd"]
    by_hand = [F.avg_pool2d(x.mT.unflatten(2, (20, 20)), 3, ceil_mode=True) for x in (teacher[0], teacher[0].flip(1))]
    ours, theirs = (x.flatten(2).mT for x in by_hand)
    assert ours.shape[1] == 49
    assert_close(pooled, log_euclidean_loss(ours, spd_logm(token_spd(theirs))), **FP32_NOISE)
    # 20 x 20 patches, averaged in windows to 10 x 10: equal tokens give no loss, misplaced ones do.
    assert terms["spd"].item() == pytest.approx(0.0, abs=1e-6)
    assert doubled["spd"].item() > 1e-3
