"""L-BFGS against scikit-learn, the SGD probe against torch's SGD, and how the probe chooses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from common.errors import UserError
from distill.evaluation.features import Features, FeatureSet
from distill.evaluation.linear import (
    LbfgsProtocol,
    LinearProtocol,
    LinearResult,
    best_result,
    held_out_split,
    linear_probe,
    subset_rows,
)
from distill.evaluation.logistic import SgdProtocol, fit_logistic, fit_sgd

# The objective's smallest curvature is lambda >= 1e-3 along weights. Ours stops within 1e-13 of an objective below 2,
# so within sqrt(2 * 2e-13 / 1e-3) = 2e-5 of the one minimum; scikit-learn at a gradient of 1e-8, within 1e-5.
WEIGHT_TOLERANCE = 3e-5
# torch.optim.SGD and the batched form differ in the order of fp32 sums only: 30 steps of relative error 1e-7
# each, amplified by momentum (a factor of 10).
SGD_TOLERANCE = 1e-4


def clusters(num_rows: int, num_classes: int, dim: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(num_classes, dim, generator=generator, dtype=torch.float64)
    generator.manual_seed(seed)
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    noise = torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)
    return centres[labels] + spread * noise, labels


def as_features(matrix: Tensor, labels: Tensor) -> Features:
    return Features(
        cls=matrix.float()[:, None],
        patch_mean=matrix.float().flip(1),
        labels=labels,
        rows=torch.arange(len(labels)),
    )


def test_every_regularisation_equals_scikit_learns_solution() -> None:
    features, labels = clusters(400, 5, 8, seed=1, spread=1.5)
    strengths = [1e-3, 1e-2, 1e-1]
    ours = fit_logistic(
        features, labels, num_classes=5, regularisations=strengths, tolerance=1e-13, max_iterations=2000
    )
    assert ours.converged.all()
    for index, strength in enumerate(strengths):
        reference = LogisticRegression(C=1 / (strength * len(labels)), tol=1e-8, max_iter=5000)
        reference.fit(features.numpy(), labels.numpy())
        # Softmax is unchanged by a shift shared by all classes; the penalty fixes it for weights, not for
        # biases.
        bias = ours.bias[index] - ours.bias[index].mean()
        np.testing.assert_allclose(ours.weight[index], reference.coef_, atol=WEIGHT_TOLERANCE)
        np.testing.assert_allclose(bias, reference.intercept_ - reference.intercept_.mean(), atol=WEIGHT_TOLERANCE)
        predicted = ours.predict(features)[index].numpy()
        assert (predicted == reference.predict(features.numpy())).all()


def test_a_problem_alone_and_among_others_has_the_same_solution() -> None:
    features, labels = clusters(200, 4, 6, seed=2, spread=1.5)
    alone, among = (
        fit_logistic(features, labels, num_classes=4, regularisations=grid, tolerance=1e-14, max_iterations=2000)
        for grid in ([1e-2], [1.0, 1e-2, 1e-3])
    )
    torch.testing.assert_close(among.weight[1], alone.weight[0], atol=1e-6, rtol=0)


def test_blocks_of_rows_do_not_change_the_solution() -> None:
    features, labels = clusters(203, 3, 5, seed=3, spread=1.5)
    whole, blocks = (
        fit_logistic(
            features,
            labels,
            num_classes=3,
            regularisations=[0.1, 1e-2],
            tolerance=1e-14,
            block_elements=elements,
        )
        for elements in (2**24, 6 * 40)
    )
    torch.testing.assert_close(blocks.weight, whole.weight, atol=1e-6, rtol=0)


def test_float32_reaches_the_loss_of_float64() -> None:
    features, labels = clusters(500, 6, 12, seed=4)
    strengths = [1e-4, 1e-2, 1.0]
    exact = fit_logistic(
        features, labels, num_classes=6, regularisations=strengths, tolerance=1e-12, max_iterations=3000
    )
    single = fit_logistic(features.float(), labels, num_classes=6, regularisations=strengths)
    assert single.converged.all()
    # It stops when the optimum is surely within a hundredth.
    torch.testing.assert_close(single.loss, exact.loss, rtol=1e-2, atol=0)


@pytest.mark.parametrize("seed", [9, 20, 31])
def test_a_weaker_penalty_never_ends_at_a_higher_objective_and_all_reach_the_optimum(seed: int) -> None:
    features, labels = clusters(600, 6, 40, seed=seed, spread=0.7)
    strengths = [1.0, 1e-2, 1e-4, 1e-5, 1e-6]
    fit = fit_logistic(features.float(), labels, num_classes=6, regularisations=strengths)
    assert fit.converged.all()
    assert (fit.loss.diff() < 0).all()
    exact = fit_logistic(features, labels, num_classes=6, regularisations=strengths, tolerance=1e-9)
    assert (fit.loss / exact.loss - 1 <= 1e-2).all()
    # At the weakest, from nothing, as scikit-learn solves it.
    reference = LogisticRegression(C=1 / (1e-6 * len(labels)), tol=1e-10, max_iter=20000).fit(features, labels)
    loss = -np.log(reference.predict_proba(features)[np.arange(600), labels]).mean()
    loss += 0.5e-6 * (reference.coef_**2).sum()
    assert fit.loss[-1].item() <= 1.01 * loss


def test_an_iteration_limit_is_reported_as_not_converged() -> None:
    features, labels = clusters(200, 4, 6, seed=5)
    fit = fit_logistic(
        features, labels, num_classes=4, regularisations=[1.0, 1e-6], tolerance=1e-6, max_iterations=20
    )
    assert fit.converged.tolist() == [True, False]


def test_a_start_at_the_solution_stays_there() -> None:
    features, labels = clusters(200, 4, 6, seed=6)
    fit = fit_logistic(features, labels, num_classes=4, regularisations=[1e-2])
    start = (fit.weight[0], fit.bias[0])
    again = fit_logistic(features, labels, num_classes=4, regularisations=[1e-2], start=start, max_iterations=0)
    assert again.converged.all()
    # To the principal axes and back: two products in fp64.
    torch.testing.assert_close(again.weight, fit.weight, atol=1e-12, rtol=0)


def test_nearly_collinear_features_converge() -> None:
    features, labels = clusters(600, 5, 12, seed=19, spread=1.5)
    scales = torch.logspace(0, -2.5, 12, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)).Q
    collinear = (features * scales) @ rotation + 3.0  # variances over five decades, off centre
    fit = fit_logistic(collinear.float(), labels, num_classes=5, regularisations=[1e-6, 1e-3], max_iterations=200)
    assert fit.converged.all()
    reference = LogisticRegression(C=1 / (1e-3 * len(labels)), tol=1e-8, max_iter=5000)
    reference.fit(collinear.numpy(), labels.numpy())
    # fp32 features around 3 with entries of W up to 30: products carry 1e-5. It stops within a hundredth.
    loss = -np.log(reference.predict_proba(collinear.numpy())[np.arange(600), labels.numpy()]).mean()
    loss += 0.5e-3 * (reference.coef_**2).sum()
    assert fit.loss[1].item() == pytest.approx(loss, rel=1e-2)


def test_sgd_equals_torchs_sgd_for_each_learning_rate() -> None:
    features, labels = clusters(96, 3, 5, seed=7)
    features = features.float()
    protocol = SgdProtocol(learning_rates=(0.1, 0.5), epochs=10, batch_size=32)
    ours = fit_sgd(features, labels, num_classes=3, protocol=protocol, seed=3)
    for index, base in enumerate((0.1, 0.5)):
        generator = torch.Generator().manual_seed(3)
        layer = nn.Linear(5, 3)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(3, 5, generator=generator) * 0.01)
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=base * 32 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        for _ in range(10):
            for rows in torch.randperm(96, generator=generator).split(32):
                optimizer.zero_grad()
                nn.functional.cross_entropy(layer(features[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
        torch.testing.assert_close(ours.weight[index], layer.weight.data, atol=SGD_TOLERANCE, rtol=0)
        torch.testing.assert_close(ours.bias[index], layer.bias.data, atol=SGD_TOLERANCE, rtol=0)


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_the_probe_finds_separable_classes_and_chance_for_noise(solver: str) -> None:
    train, labels = clusters(600, 4, 8, seed=8, spread=0.1)
    val, val_labels = clusters(200, 4, 8, seed=9, spread=0.1)
    noise = torch.randn(600, 8, generator=torch.Generator().manual_seed(1))
    val_noise = torch.randn(200, 8, generator=torch.Generator().manual_seed(2))
    protocol = LinearProtocol(solver=solver, sgd=SgdProtocol(learning_rates=(0.1, 1.0), epochs=35, batch_size=64))
    sets = [FeatureSet(1, False), FeatureSet(1, True)]
    good = linear_probe(
        as_features(train, labels), as_features(val, val_labels), sets=sets, protocol=protocol, device="cpu"
    )
    assert [result.top1 for result in good] == [100, 100]
    chance = linear_probe(
        as_features(noise, labels),
        as_features(val_noise, val_labels),
        sets=sets[:1],
        protocol=protocol,
        device="cpu",
    )
    # Four classes: 25 %, with a standard deviation of 3.1 points on 200 images; five of them.
    assert abs(chance[0].top1 - 25) < 15.5


def test_val_takes_no_part_in_the_choice() -> None:
    train, labels = clusters(400, 4, 6, seed=10, spread=1.5)
    val, val_labels = clusters(100, 4, 6, seed=11, spread=1.5)
    sets = [FeatureSet(1, False)]
    honest = linear_probe(
        as_features(train, labels),
        as_features(val, val_labels),
        sets=sets,
        protocol=LinearProtocol(),
        device="cpu",
    )[0]
    spoiled = linear_probe(
        as_features(train, labels),
        as_features(-val, val_labels),
        sets=sets,
        protocol=LinearProtocol(),
        device="cpu",
    )[0]
    assert (spoiled.setting, spoiled.held_out_top1) == (honest.setting, honest.held_out_top1)
    assert spoiled.top1 < honest.top1


def test_a_val_class_that_train_lacks_counts_as_an_error() -> None:
    train, labels = clusters(300, 3, 8, seed=12, spread=0.1)
    val, val_labels = clusters(100, 3, 8, seed=13, spread=0.1)
    # Class numbers with a gap: 0, 10, 20 in train; half of val is of class 5.
    half = torch.cat([10 * val_labels[:50], torch.full((50,), 5)])
    result = linear_probe(
        as_features(train, 10 * labels),
        as_features(val, half),
        sets=[FeatureSet(1, False)],
        protocol=LinearProtocol(),
        device="cpu",
    )[0]
    assert result.top1 == 50


def test_a_choice_at_a_rising_edge_of_the_grid_is_marked() -> None:
    train, labels = clusters(400, 4, 6, seed=14, spread=0.1)
    features, sets = as_features(train, labels), [FeatureSet(1, False)]

    def probed(protocol: LinearProtocol) -> LinearResult:
        return linear_probe(features, features, sets=sets, protocol=protocol, device="cpu")[0]

    def sgd(*rates: float) -> LinearProtocol:
        return LinearProtocol(solver="sgd", sgd=SgdProtocol(learning_rates=rates, epochs=35, batch_size=64))

    # A rate of 1e-8 learns nothing: accuracy rises to the last rate offered.
    rising = probed(sgd(1e-8, 1.0))
    assert (rising.setting, rising.at_grid_edge) == (1.0, True)
    assert not probed(sgd(1.0)).at_grid_edge
    # Separable classes: every strength is perfect, the strongest is taken, and no wider grid could be better.
    flat = probed(LinearProtocol())
    assert (flat.setting, flat.held_out_top1, flat.at_grid_edge) == (1.0, 100.0, False)


def test_scaling_and_shifting_the_features_leaves_the_lbfgs_probe_alone() -> None:
    train, labels = clusters(300, 4, 6, seed=15, spread=1.5)
    val, val_labels = clusters(300, 4, 6, seed=16, spread=1.5)
    # A power of two, exact in fp32, and a dead channel, which has no scale.
    results = [
        linear_probe(
            as_features(change(train), labels),
            as_features(change(val), val_labels),
            sets=[FeatureSet(1, False)],
            protocol=LinearProtocol(),
            device="cpu",
        )[0]
        for change in (lambda x: x, lambda x: torch.cat([1024 * x, torch.full_like(x[:, :1], 7.0)], dim=1))
    ]
    assert results[0].setting == results[1].setting
    # One image is 1/3 of a point: rounding may move two images that lie on a boundary.
    assert results[0].top1 == pytest.approx(results[1].top1, abs=0.7)


def test_the_best_feature_set_is_the_best_on_the_held_out_part() -> None:
    train, labels = clusters(400, 4, 6, seed=17, spread=0.5)
    features = Features(
        cls=torch.randn(400, 1, 6, generator=torch.Generator().manual_seed(0)),
        patch_mean=train.float(),
        labels=labels,
        rows=torch.arange(400),
    )
    results = linear_probe(
        features,
        features,
        sets=[FeatureSet(1, False), FeatureSet(1, True)],
        protocol=LinearProtocol(),
        device="cpu",
    )
    assert best_result(results).features == "cls+mean"
    assert results[1].held_out_top1 > results[0].held_out_top1


def test_a_held_out_split_is_stratified_disjoint_and_seeded() -> None:
    labels = np.repeat(np.arange(7), [1, 2, 10, 25, 40, 100, 3])
    fit, held = held_out_split(labels, fraction=0.1, seed=5)
    assert np.array_equal(np.sort(np.concatenate([fit, held])), np.arange(len(labels)))
    assert len(held) == 18
    counts = np.bincount(labels[held], minlength=7)
    assert counts[0] == 0
    assert (np.abs(counts[1:] - 0.1 * np.bincount(labels)[1:]) < 1).all()
    assert np.array_equal(held_out_split(labels, fraction=0.1, seed=5)[1], held)
    assert not np.array_equal(held_out_split(labels, fraction=0.1, seed=6)[1], held)


def test_a_row_limit_takes_a_seeded_sample() -> None:
    rows = subset_rows(100, limit=10, seed=1)
    assert len(set(rows.tolist())) == 10
    assert (np.diff(rows) > 0).all()
    assert np.array_equal(rows, subset_rows(100, limit=10, seed=1))
    assert np.array_equal(subset_rows(5, limit=None, seed=1), np.arange(5))
    assert np.array_equal(subset_rows(5, limit=9, seed=1), np.arange(5))


@pytest.mark.parametrize(
    ("labels", "fraction", "said"),
    [
        ([0, 1, 2], 0.1, "leave none to hold out"),
        ([0, 0, -1], 0.3, "1 of 3 rows have no class"),
        ([0, 0, 1, 1], 0.9, "fraction 0.9"),
    ],
)
def test_a_split_that_cannot_be_made_says_why(labels: list[int], fraction: float, said: str) -> None:
    with pytest.raises(UserError, match=said):
        held_out_split(np.array(labels), fraction=fraction, seed=0)


def test_bad_probe_input_says_what_to_do() -> None:
    train, labels = clusters(40, 2, 4, seed=18)
    good, sets = as_features(train, labels), [FeatureSet(1, False)]
    with pytest.raises(UserError, match=r"'newton' is not known. Choose lbfgs or sgd"):
        linear_probe(good, good, sets=sets, protocol=LinearProtocol(solver="newton"), device="cpu")
    with pytest.raises(UserError, match=r"--regularisations \(0.1, 0\): each must be above 0"):
        LbfgsProtocol(regularisations=(0.1, 0))
    with pytest.raises(UserError, match=r"--epochs 0, --batch_size 1024: rates must be above 0"):
        SgdProtocol(epochs=0)
    with pytest.raises(UserError, match="Add 1 to --layers"):
        linear_probe(good, good, sets=[], protocol=LinearProtocol(), device="cpu")
    with pytest.raises(UserError, match="1 classes in train"):
        one = as_features(train, torch.zeros_like(labels))
        linear_probe(one, good, sets=sets, protocol=LinearProtocol(), device="cpu")
    with pytest.raises(UserError, match="40 of 40 val rows without one"):
        unknown = as_features(train, torch.full_like(labels, -1))
        linear_probe(good, unknown, sets=sets, protocol=LinearProtocol(), device="cpu")
    with pytest.raises(UserError, match="4 blocks are asked for, 1 were extracted"):
        linear_probe(good, good, sets=[FeatureSet(4, False)], protocol=LinearProtocol(), device="cpu")
