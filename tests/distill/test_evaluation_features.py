"""Feature extraction against the model's own forward pass, and the measures computed from features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from distill.evaluation.features import (
    FeatureModel,
    FeatureSet,
    extract_features,
    extract_features_of,
    extract_patch_tokens,
    feature_sets,
    model_depth,
)
from distill.evaluation.figures import HIGH, LOW, fit_patch_basis, paint_patches, quantile
from distill.evaluation.measures import cosine_to_teacher, fit_linear_map, rankme
from distill.models import create_backbone
from pipeline.batch import normalise

# Orthogonal maps and projections in fp64, handed back in fp32.
SINGLE = 1e-5


@dataclass(frozen=True)
class Crops:
    rows: npt.NDArray[np.int64]
    crops: Tensor
    labels: Tensor


def batches(num_rows: int = 7, size: int = 32) -> list[Crops]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (num_rows, size, size, 3), generator=generator, dtype=torch.uint8)
    rows = torch.arange(num_rows) + 100
    parts = zip(rows.split(3), pixels.split(3), (rows % 4).split(3), strict=True)
    return [Crops(r.numpy(), crops, labels) for r, crops, labels in parts]


def small_vit(depth: int = 3, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    args = {"embed_dim": 32, "depth": depth, "num_heads": 2, "init_values": 1.0}
    return create_backbone("vit_small", patch_size=8, model_args=args).eval()


def test_features_equal_the_models_own_tokens() -> None:
    model, crops = small_vit(), batches()
    features = extract_features(model, crops, normalise=normalise, device="cpu", layers=2)
    with torch.no_grad():
        images = normalise(torch.cat([batch.crops for batch in crops]))
        tokens = model.forward_features(images)
        # The block before the last, by hand: everything but the last block, then the norm.
        last = model.blocks[2]
        del model.blocks[2]
        before = model.forward_features(images)
        model.blocks.append(last)
    # Batches of 3 against one of 7: BLAS may sum in another order.
    torch.testing.assert_close(features.cls[:, 1], tokens[:, 0], atol=SINGLE, rtol=0)
    torch.testing.assert_close(features.cls[:, 0], before[:, 0], atol=SINGLE, rtol=0)
    torch.testing.assert_close(features.patch_mean, tokens[:, 5:].mean(dim=1), atol=SINGLE, rtol=0)
    assert features.rows.tolist() == [100, 101, 102, 103, 104, 105, 106]
    assert features.labels.tolist() == [0, 1, 2, 3, 0, 1, 2]


def test_two_models_in_one_pass_equal_each_alone() -> None:
    models = {
        "a": FeatureModel(small_vit(2), normalise),
        "b": FeatureModel(small_vit(3, seed=1), lambda crops: normalise(crops, mean=(0.5, 0.5, 0.5))),
    }
    together = extract_features_of(models, iter(batches()), device="cpu", layers=3)
    for name, entry in models.items():
        alone = extract_features(entry.model, batches(), normalise=entry.normalise, device="cpu", layers=3)
        assert torch.equal(together[name].cls, alone.cls)
        assert torch.equal(together[name].patch_mean, alone.patch_mean)
    assert together["a"].cls.shape[1] == 2  # it has no third block to give


def test_lower_precision_runs_under_autocast_and_comes_back_in_float32() -> None:
    model = small_vit()
    exact = extract_features(model, batches(), normalise=normalise, device="cpu")
    low = extract_features(model, batches(), normalise=normalise, device="cpu", dtype=torch.bfloat16)
    assert low.cls.dtype == torch.float32
    error = (low.cls - exact.cls).norm() / exact.cls.norm()
    # bf16 rounds at 2^-9; three blocks of a few roundings each stay within ten of them, and are not exact.
    assert 1e-5 < error < 10 * 2**-9
    cast = extract_features(
        model.to(torch.bfloat16), batches(), normalise=normalise, device="cpu", dtype=torch.bfloat16
    )
    assert (cast.cls - exact.cls).norm() / exact.cls.norm() < 20 * 2**-9


def test_patch_tokens_leave_out_cls_and_registers() -> None:
    model, crops = small_vit(), batches()[0].crops
    with torch.no_grad():
        tokens = model.forward_features(normalise(crops))
    got = extract_patch_tokens(FeatureModel(model, normalise), crops)
    assert torch.equal(got, tokens[:, 5:])


def test_feature_sets_are_concatenated_as_in_dinov2() -> None:
    features = extract_features(small_vit(), batches(), normalise=normalise, device="cpu", layers=3)
    joined = FeatureSet(2, True).of(features)
    assert torch.equal(joined, torch.cat([features.cls[:, 1], features.cls[:, 2], features.patch_mean], dim=1))
    assert torch.equal(FeatureSet(1, False).of(features), features.cls[:, 2])
    kept, left_out = feature_sets((4, 1), model_depth(small_vit()))
    assert [s.name for s in kept] == ["cls", "cls+mean"]
    assert [s.name for s in left_out] == ["cls, last 4", "cls+mean, last 4"]


def test_an_empty_stream_is_named() -> None:
    with pytest.raises(UserError, match="0 rows to evaluate"):
        extract_features(small_vit(), [], normalise=normalise, device="cpu")


def test_a_model_without_a_class_token_is_measured_by_its_pooled_features() -> None:
    model = create_backbone("resnet10t").eval()
    features = extract_features(model, batches(), normalise=normalise, device="cpu", layers=4)
    crops = torch.cat([batch.crops for batch in batches()])
    with torch.no_grad():
        expected = model(normalise(crops))
    assert features.cls.shape == (len(crops), 1, 512)
    # Batches of other sizes: the same sums in another order.
    torch.testing.assert_close(features.cls[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_rankme_counts_equal_directions_and_ignores_scale() -> None:
    basis = torch.linalg.qr(torch.randn(40, 6, generator=torch.Generator().manual_seed(0))).Q
    assert rankme(basis) == pytest.approx(6, abs=SINGLE)
    assert rankme(1000 * basis) == pytest.approx(6, abs=SINGLE)
    assert rankme(torch.ones(50, 8)) == pytest.approx(1, abs=SINGLE)
    # Singular values 3 and 1: shares 3/4 and 1/4, entropy 0.5623 nats.
    assert rankme(basis[:, :2] * torch.tensor([3.0, 1.0])) == pytest.approx(np.exp(0.562335), abs=SINGLE)
    repeated = basis.repeat_interleave(10, dim=0)
    assert rankme(repeated, max_rows=200) == pytest.approx(6, abs=0.2)


def test_a_linear_map_is_found_and_an_unrelated_teacher_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(500, 6, generator=generator)
    matrix = torch.randn(6, 9, generator=generator)
    teacher = student @ matrix + 5.0
    mapping = fit_linear_map(student[:400], teacher[:400], ridge=1e-9)
    torch.testing.assert_close(mapping(student[400:]), teacher[400:], atol=1e-4, rtol=0)
    agreement = cosine_to_teacher(student[:400], teacher[:400], student[400:], teacher[400:])
    assert agreement == pytest.approx(1, abs=1e-4)
    # A shared offset must not count as agreement. Cosines of 9-d noise: 1/3 each, 1/sqrt(9 * 100) of their
    # mean.
    noise = torch.randn(500, 9, generator=generator) + 5.0
    assert abs(cosine_to_teacher(student[:400], noise[:400], student[400:], noise[400:])) < 5 / 30
    with pytest.raises(UserError, match="400 student and 500 teacher rows"):
        fit_linear_map(student[:400], teacher)


def test_the_patch_basis_holds_its_definition_and_its_signs() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([9.0, 5.0, 3.0, 0.1, 0.1, 0.1])
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    tokens = (torch.randn(20, 30, 6, generator=generator) * scales) @ rotation.T + 2.0
    basis = fit_patch_basis(tokens)
    torch.testing.assert_close(basis.components @ basis.components.T, torch.eye(3), atol=SINGLE, rtol=0)
    # The directions of the three large variances, in order; sampling error of 600 tokens is some 1/sqrt(600).
    overlap = (basis.components @ rotation[:, :3]).abs().diagonal()
    assert (overlap > 0.99).all()
    assert (basis.components.gather(1, basis.components.abs().argmax(dim=1, keepdim=True)) > 0).all()
    mirrored = fit_patch_basis(4.0 - tokens)  # every token mirrored in the mean: the same axes
    torch.testing.assert_close(mirrored.components, basis.components, atol=1e-4, rtol=0)
    colours = basis.colours(tokens)
    assert colours.min() == 0
    assert colours.max() == 1
    scores = basis.scores(tokens).flatten(0, 1)
    for bound, share in ((basis.low, LOW), (basis.high, HIGH)):
        torch.testing.assert_close(quantile(scores, share), bound, atol=1e-4, rtol=0)


def test_a_rotated_student_is_painted_like_its_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(12, 16, 8, generator=generator)
    student = teacher @ torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q + 1.0
    basis = fit_patch_basis(teacher)
    mapping = fit_linear_map(student[:8].flatten(0, 1), teacher[:8].flatten(0, 1), ridge=1e-9)
    torch.testing.assert_close(basis.colours(mapping(student[8:])), basis.colours(teacher[8:]), atol=1e-4, rtol=0)
    coarse = teacher[:, :4]
    colours, left_out = paint_patches(
        {"coarse": coarse[:8], "student": student[:8], "teacher": teacher[:8]},
        {"coarse": coarse[8:], "student": student[8:], "teacher": teacher[8:]},
        teacher="teacher",
        ridge=1e-9,
    )
    assert list(colours) == ["teacher", "student"]
    assert left_out == ["coarse"]
    assert torch.equal(colours["teacher"], fit_patch_basis(teacher[:8]).colours(teacher[8:]))
    torch.testing.assert_close(colours["student"], colours["teacher"], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="3 patch tokens of dimension 8"):
        fit_patch_basis(teacher[:1, :3])
