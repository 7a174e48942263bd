"""What a matrix logarithm and a log-Euclidean distance must satisfy, for both paths in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.spd import log_euclidean_loss, spd_logm, token_spd
from kernels.spd.poles import rational_log

EXACT = 1e-11
"""float64 rounding of an eigendecomposition or inverse at a condition number below 100 and n below 12."""

both = pytest.mark.parametrize("backend", ["eigh", "resolvent"])
seeds = st.integers(0, 2**20)
sizes = st.integers(1, 11)


def tolerance(backend, eps, n):
    """Of a single logarithm, Frobenius: the certified error for the rational function."""
    return EXACT + (math.sqrt(n) * rational_log(eps, n).error if backend == "resolvent" else 0.0)


def random_tokens(seed, n, channels=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, n, channels, dtype=torch.float64, generator=generator)


def orthogonal(seed, n):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q


def with_spectrum(values, seed):
    q = orthogonal(seed, len(values))
    return (q * torch.as_tensor(values, dtype=torch.float64)) @ q.T


@both
@settings(deadline=None, max_examples=20)
@given(n=sizes, scale=st.floats(1.0, 1.9))
def test_log_of_a_multiple_of_the_identity(backend, n, scale):
    log = spd_logm(scale * torch.eye(n, dtype=torch.float64)[None], backend=backend)[0]
    expected = math.log(scale) * torch.eye(n, dtype=torch.float64)
    assert float((log - expected).norm()) <= tolerance(backend, 1.0, n)


@both
@settings(deadline=None, max_examples=20)
@given(seed=seeds, n=sizes, factor=st.floats(0.1, 1.0))
def test_log_of_a_scaled_matrix_is_shifted(backend, seed, n, factor):
    matrices = token_spd(random_tokens(seed, n))
    shifted = spd_logm(matrices, backend=backend) + math.log(factor) * torch.eye(n, dtype=torch.float64)
    # The lower end of the spectrum is scaled too, and its upper end is below n + factor.
    scaled = spd_logm(factor * matrices, eps=factor, backend=backend)
    bound = tolerance(backend, factor, n) + tolerance(backend, 1.0, n)
    assert float((scaled - shifted).norm()) <= bound


@both
@settings(deadline=None, max_examples=20)
@given(seed=seeds, n=sizes)
def test_log_of_a_commuting_product_is_the_sum_of_logs(backend, seed, n):
    generator = torch.Generator().manual_seed(seed)
    # Spectra in [1, sqrt(n + 1)], so that the product's is in [1, n + 1].
    first, second = 1 + (math.sqrt(n + 1) - 1) * torch.rand(2, n, dtype=torch.float64, generator=generator)
    a, b = with_spectrum(first, seed), with_spectrum(second, seed)
    product = spd_logm((a @ b)[None], backend=backend)
    total = spd_logm(a[None], backend=backend) + spd_logm(b[None], backend=backend)
    assert float((product - total).norm()) <= 3 * tolerance(backend, 1.0, n)


@both
@settings(deadline=None, max_examples=20)
@given(seed=seeds, n=sizes)
def test_log_commutes_with_orthogonal_congruence(backend, seed, n):
    matrices = token_spd(random_tokens(seed, n))
    q = orthogonal(seed + 1, n)
    rotated = spd_logm(q @ matrices @ q.T, backend=backend)
    assert float((rotated - q @ spd_logm(matrices, backend=backend) @ q.T).norm()) <= EXACT


@both
@settings(deadline=None, max_examples=20)
@given(seed=seeds, n=sizes)
def test_exponential_undoes_the_log_and_the_log_is_symmetric(backend, seed, n):
    matrices = token_spd(random_tokens(seed, n))
    log = spd_logm(matrices, backend=backend)
    assert float((log - log.mT).abs().max()) <= EXACT
    relative = (torch.linalg.matrix_exp(log) - matrices).norm() / matrices.norm()
    assert float(relative) <= 2 * tolerance(backend, 1.0, n)


@both
@settings(deadline=None, max_examples=20)
@given(seed=seeds, n=st.integers(2, 11))
def test_loss_is_zero_at_equality_and_only_there(backend, seed, n):
    tokens = random_tokens(seed, n)
    target = spd_logm(token_spd(tokens), backend=backend)
    assert float(log_euclidean_loss(tokens, target, backend=backend)) <= EXACT**2

    other = token_spd(random_tokens(seed + 1, n))
    distance = float((other - token_spd(tokens)).norm())
    loss = float(log_euclidean_loss(tokens, spd_logm(other, backend=backend), backend=backend))
    # log has slope at least 1 / (n + 1) on the spectrum; half of it covers the slope of the rational function.
    assert loss * n >= (0.5 * distance / (n + 1)) ** 2


@both
@settings(deadline=None, max_examples=20)
@given(seed=seeds, n=sizes)
def test_loss_is_symmetric_in_student_and_teacher(backend, seed, n):
    first, second = random_tokens(seed, n), random_tokens(seed + 1, n, channels=24)
    forth = log_euclidean_loss(first, spd_logm(token_spd(second), backend=backend), backend=backend)
    back = log_euclidean_loss(second, spd_logm(token_spd(first), backend=backend), backend=backend)
    assert float((forth - back).abs()) <= EXACT


@both
@settings(deadline=None, max_examples=20)
@given(seed=seeds, n=sizes, power=st.integers(-20, 20))
def test_loss_ignores_rotation_and_scale_of_the_channels(backend, seed, n, power):
    tokens = random_tokens(seed, n)
    target = spd_logm(token_spd(random_tokens(seed + 1, n)), backend=backend)
    turned = 2.0**power * tokens @ orthogonal(seed + 2, 16)
    difference = log_euclidean_loss(tokens, target, backend=backend) - log_euclidean_loss(
        turned, target, backend=backend
    )
    assert float(difference.abs()) <= EXACT


@both
def test_permuting_crops_permutes_losses_and_permuting_tokens_of_both_changes_nothing(backend):
    tokens = torch.randn(5, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    teacher = torch.randn(5, 9, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    losses = log_euclidean_loss(
        tokens, spd_logm(token_spd(teacher), backend=backend), backend=backend, reduction="none"
    )
    crops = torch.tensor([3, 0, 4, 1, 2])
    places = torch.tensor([8, 2, 5, 0, 1, 7, 3, 6, 4])
    permuted = log_euclidean_loss(
        tokens[crops][:, places],
        spd_logm(token_spd(teacher[crops][:, places]), backend=backend),
        backend=backend,
        reduction="none",
    )
    assert float((permuted - losses[crops]).abs().max()) <= EXACT


@both
def test_mean_is_the_mean_of_crops(backend):
    tokens = random_tokens(0, 9).repeat(3, 1, 1) + torch.arange(3)[:, None, None]
    target = spd_logm(token_spd(random_tokens(1, 9).repeat(3, 1, 1)), backend=backend)
    each = log_euclidean_loss(tokens, target, backend=backend, reduction="none")
    assert each.shape == (3,)
    assert float(log_euclidean_loss(tokens, target, backend=backend) - each.mean()) == 0.0
