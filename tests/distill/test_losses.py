"""Each loss against the plainest loop that computes it, in values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from distill import losses

# fp64 references and fp64 inputs: what is left is the order of at most 1e5 additions.
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def dino_by_pairs(student: Tensor, teacher: Tensor, temp: float, same_view: bool) -> Tensor:
    values = []
    for i in range(student.shape[0]):
        for j in range(teacher.shape[0]):
            if i == j and not same_view:
                continue
            for image in range(student.shape[1]):
                log_q = torch.log_softmax(student[i, image] / temp, dim=0)
                values.append(-(teacher[j, image] * log_q).sum())
    return torch.stack(values).mean()


def ibot_by_crops(student: Tensor, teacher: Tensor, crop_of_row: list[int], num_crops: int, temp: float) -> Tensor:
    """Meta's `forward_masked`: the rows of a crop weigh one over their number, the sum is over all crops."""
    total = torch.zeros((), dtype=torch.float64)
    for row, crop in enumerate(crop_of_row):
        log_q = torch.log_softmax(student[row] / temp, dim=0)
        total = total - (teacher[row] * log_q).sum() / crop_of_row.count(crop)
    return total / num_crops


def koleo_by_pairs(cls: Tensor) -> Tensor:
    unit = cls / cls.norm(dim=1, keepdim=True)
    distances = [
        min(((unit[i] - unit[j]).norm() for j in range(len(unit)) if j != i), key=lambda d: d.item())
        for i in range(len(unit))
    ]
    return -torch.stack([torch.log(d) for d in distances]).mean()


def both(fast: Callable[[Tensor], Tensor], slow: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Assert that two functions agree in value and gradient at x."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    fast_value, slow_value = fast(a), slow(b)
    assert_close(fast_value, slow_value, **EXACT)
    fast_value.backward()
    slow_value.backward()
    assert_close(a.grad, b.grad, **EXACT)


@pytest.mark.parametrize("same_view", [False, True])
@pytest.mark.parametrize(("views", "global_views"), [(10, 2), (2, 2), (5, 1)])
def test_dino_loss_equals_the_loop_over_pairs(views: int, global_views: int, same_view: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(views, 4, 7, dtype=torch.float64, generator=generator)
    teacher = torch.rand(global_views, 4, 7, dtype=torch.float64, generator=generator)
    teacher = teacher / teacher.sum(-1, keepdim=True)
    both(
        lambda z: losses.dino_loss(z, teacher, student_temp=0.1, same_view=same_view),
        lambda z: dino_by_pairs(z, teacher, 0.1, same_view),
        student,
    )


@pytest.mark.parametrize("same_view", [False, True])
def test_dino_loss_weighs_global_and_local_crops_as_meta_does(same_view: bool) -> None:
    g, local, b = 2, 8, 3
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(g + local, b, 6, dtype=torch.float64, generator=generator)
    teacher = torch.softmax(torch.randn(g, b, 6, dtype=torch.float64, generator=generator), dim=-1)

    def mean_over(views: range) -> tuple[Tensor, int]:
        pairs = [(s, t) for s in views for t in range(g) if same_view or s != t]
        log_q = torch.log_softmax(student / 0.1, dim=-1)
        return torch.stack([-(teacher[t] * log_q[s]).sum(-1).mean() for s, t in pairs]).mean(), len(pairs)

    (of_global, global_terms), (of_local, local_terms) = mean_over(range(g)), mean_over(range(g, g + local))
    terms = global_terms + local_terms  # dino_global_scale and dino_local_scale of ssl_meta_arch.py
    expected = of_global * (global_terms / terms) + of_local * (local_terms / terms)
    assert_close(losses.dino_loss(student, teacher, student_temp=0.1, same_view=same_view), expected, **EXACT)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 1000))
def test_ibot_loss_equals_metas_sum_over_masked_patches_divided_by_all_crops(counts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    crop_of_row = [crop for crop, count in enumerate(counts) for _ in range(count)]
    rows, num_crops = len(crop_of_row), 2 * len(counts)  # every other crop has no mask
    student = torch.randn(rows, 5, dtype=torch.float64, generator=generator)
    teacher = torch.softmax(torch.randn(rows, 5, dtype=torch.float64, generator=generator), dim=-1)
    per_image = torch.tensor([counts[crop] for crop in crop_of_row], dtype=torch.float64)
    both(
        lambda z: losses.ibot_loss(z, teacher, per_image, num_crops=num_crops, student_temp=0.2),
        lambda z: ibot_by_crops(z, teacher, crop_of_row, num_crops, 0.2),
        student,
    )


def test_koleo_loss_equals_the_loop_over_pairs() -> None:
    x = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(3))
    fast, slow = x.clone().requires_grad_(), x.double().clone().requires_grad_()
    value = losses.koleo_loss(fast)
    reference = koleo_by_pairs(slow[0]) + koleo_by_pairs(slow[1])
    # fp32: a distance of about 0.5 is a difference of unit vectors, so 2^-23 / 0.5 relative, times 1/d in the log.
    assert_close(value.double(), reference, rtol=1e-5, atol=1e-6)
    value.backward()
    reference.backward()
    assert_close(fast.grad.double(), slow.grad, rtol=1e-4, atol=1e-6)


def test_koleo_loss_of_equal_tokens_is_finite_and_has_a_finite_gradient() -> None:
    x = torch.ones(1, 4, 8, requires_grad=True)
    value = losses.koleo_loss(x)
    value.backward()
    assert value.item() == pytest.approx(-math.log(1e-8), rel=1e-3)
    assert torch.isfinite(x.grad).all()


def test_cls_loss_is_zero_for_parallel_and_two_for_opposite_tokens() -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert losses.cls_loss(x, 3 * x).item() == pytest.approx(0, abs=1e-6)
    assert losses.cls_loss(x, -x).item() == pytest.approx(2, abs=1e-6)
    cosines = [torch.dot(a, b) / (a.norm() * b.norm()) for a, b in zip(x, x.flip(0), strict=True)]
    assert losses.cls_loss(x, x.flip(0)).item() == pytest.approx(1 - torch.stack(cosines).mean().item(), abs=1e-6)


def test_cross_entropy_is_entropy_plus_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(torch.randn(6, 9, dtype=torch.float64, generator=generator), -1)
    q = torch.softmax(torch.randn(6, 9, dtype=torch.float64, generator=generator), -1)
    loss = -(p * q.log()).sum(-1).mean()
    entropy, divergence = losses.cross_entropy_parts(loss, p)
    assert_close(entropy, -(p * p.log()).sum(-1).mean(), **EXACT)
    assert_close(divergence, (p * (p / q).log()).sum(-1).mean(), **EXACT)


def test_entropy_of_a_one_hot_target_is_zero() -> None:
    entropy, _ = losses.cross_entropy_parts(torch.zeros(()), torch.eye(4))
    assert entropy.item() == 0.0


def gram_by_pairs(student: Tensor, teacher: Tensor, *, softmax: bool) -> Tensor:
    values = []
    for s, t in zip(student, teacher, strict=True):
        for i in range(len(s)):
            cos_s = torch.stack([torch.dot(s[i], x) / (s[i].norm() * x.norm()) for x in s])
            cos_t = torch.stack([torch.dot(t[i], x) / (t[i].norm() * x.norm()) for x in t])
            if softmax:
                p, q = torch.softmax(cos_t / 0.07, 0), torch.softmax(cos_s / 0.07, 0)
                values.append((p * (p / q).log()).sum())
            else:
                values.append((cos_s - cos_t).square().mean())
    return torch.stack(values).mean()


@pytest.mark.parametrize("softmax", [False, True])
def test_gram_losses_equal_the_loop_over_patch_pairs(softmax: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 5, 8, generator=generator)
    teacher = torch.randn(2, 5, 3, generator=generator)
    value = (losses.softmax_gram_loss if softmax else losses.gram_loss)(student, teacher)
    # fp32 sums of 8 terms: 8 * 2^-24 on a cosine, times 1 / 0.07 in the softmax's logits.
    assert_close(value.double(), gram_by_pairs(student.double(), teacher.double(), softmax=softmax), rtol=1e-5, atol=0)


def test_gram_losses_do_not_see_rotations_of_feature_space() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 5, 8, generator=generator)
    teacher = student @ torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    # Squares of, and divergences at, cosines that are off by rounding: (8 * 2^-24)^2, times (1 / 0.07)^2.
    assert losses.gram_loss(student, teacher).item() < 1e-12
    assert abs(losses.softmax_gram_loss(student, teacher).item()) < 1e-6


def test_patch_regression_loss_is_cosine_plus_smooth_l1() -> None:
    student, teacher = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.5]])
    # 1 - cos = 1; smooth L1 of (3, -0.5): (3 - 0.5 + 0.125) / 2.
    assert losses.patch_regression_loss(student, teacher).item() == pytest.approx(1 + 2.625 / 2)


def test_proteus_loss_is_three_means_of_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (3, 5, 4), (6, 4))
    cls, patches, masked = (tuple(torch.randn(2, *shape, generator=generator)) for shape in shapes)
    squares = [(s - t).square() for s, t in (cls, patches, masked)]
    whole = (squares[0].sum() + squares[1].sum()) / (3 * 6 * 4)
    expected = squares[0].sum() / 12 + whole + squares[2].sum() / 24
    assert_close(losses.proteus_loss(cls, patches, masked), expected)
