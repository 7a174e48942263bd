"""Values and gradients of both paths against float64, on tokens that are hard for a logarithm."""

import math

import pytest
import torch

from kernels.spd import log_euclidean_loss, spd_logm, token_spd
from kernels.spd.eigh import loewner_matrix
from kernels.spd.loss import log_loss_op, logm_backward_op
from kernels.spd.poles import rational_log
from kernels.spd.reference import log_divided_difference, reference_token_spd
from kernels.spd.resolvent import inverse_by_solve

SIZES = (1, 7, 36, 49, 64, 196, 256)
KINDS = ("random", "duplicates", "rank_deficient", "near_degenerate", "ill_conditioned")

everywhere = pytest.mark.parametrize("kind", KINDS)
every_size = pytest.mark.parametrize("n", SIZES)

DOUBLE_TOLERANCE = 1e-12
"""float64 against float64 in another order of operations: n^2 2^-53 / eps, with n below 64."""


def frobenius(difference):
    return float(difference.double().norm(dim=(-2, -1)).max())


@everywhere
@every_size
def test_eigh_path_equals_float64_reference(spd_case, kind, n):
    case = spd_case(kind, n)
    log = spd_logm(case.matrices, eps=case.eps, backend="eigh")
    loss, gradient = log_loss_op(case.matrices, case.target, case.eps, "eigh", True)

    assert log.dtype == torch.float32
    assert frobenius(log - case.logs) <= case.rounding
    assert float((loss / n - case.losses).abs().max()) <= case.loss_bound(case.rounding)
    assert frobenius(gradient / n - case.gradients) <= case.gradient_bound(case.rounding)


@everywhere
@every_size
def test_resolvent_path_equals_float64_reference_within_its_certificate(spd_case, rational_error, kind, n):
    case = spd_case(kind, n)
    error = rational_error(case.eps, n)
    log = spd_logm(case.matrices, eps=case.eps, backend="resolvent")
    loss, gradient = log_loss_op(case.matrices, case.target, case.eps, "resolvent", True)

    log_bound = n**0.5 * error.value + case.rounding
    # |f - log| enters E; the divided differences of f - log are at most its largest slope.
    gradient_bound = case.gradient_bound(log_bound) + 2 / n * error.slope * case.distance
    assert frobenius(log - case.logs) <= log_bound
    assert float((loss / n - case.losses).abs().max()) <= case.loss_bound(log_bound)
    assert frobenius(gradient / n - case.gradients) <= gradient_bound


@everywhere
@pytest.mark.parametrize("n", [7, 49, 196])
def test_resolvent_gradient_is_that_of_its_own_rational_function(spd_case, kind, n):
    case = spd_case(kind, n)
    rational = rational_log(case.eps, n)
    poles = torch.tensor(rational.poles, dtype=torch.float64)
    residues = torch.tensor(rational.residues, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(case.matrices.double())
    inverses = 1 / (values[:, :, None] + poles)  # [b, n, poles]
    log = vectors @ torch.diag_embed(rational.constant - (residues * inverses).sum(dim=-1)) @ vectors.mT
    differences = (residues * inverses) @ inverses.mT
    upstream = 2 / n * (log - case.target)
    expected = vectors @ (differences * (vectors.mT @ upstream @ vectors)) @ vectors.mT

    _, gradient = log_loss_op(case.matrices, case.target, case.eps, "resolvent", True)
    assert frobenius(gradient / n - expected) <= case.gradient_bound(case.rounding)


@pytest.mark.parametrize("backend", ["eigh", "resolvent"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_logm_is_the_gradient_of_the_loss(spd_case, backend, kind):
    case = spd_case(kind, 36)
    log = spd_logm(case.matrices, eps=case.eps, backend=backend)
    _, expected = log_loss_op(case.matrices, case.target, case.eps, backend, True)
    found = logm_backward_op(case.matrices, 2 * (log - case.target), case.eps, backend)
    # The same formulas on the same matrices: only the order of roundings differs.
    assert frobenius(found - expected) / 36 <= case.gradient_bound(case.rounding)


@pytest.mark.parametrize("backend", ["eigh", "resolvent"])
def test_only_the_symmetric_part_of_an_incoming_gradient_counts(spd_case, backend):
    case = spd_case("random", 36)
    incoming = torch.randn(2, 36, 36, generator=torch.Generator().manual_seed(0))
    found = logm_backward_op(case.matrices, incoming, 1.0, backend)
    assert torch.equal(found, logm_backward_op(case.matrices, 0.5 * (incoming + incoming.mT), 1.0, backend))
    # A symmetric matrix moves in symmetric directions, so its gradient is symmetric: to rounding.
    assert frobenius(found - found.mT) <= 2.0**-24 * 36 * frobenius(incoming)


@pytest.mark.parametrize("backend", ["eigh", "resolvent"])
@pytest.mark.parametrize("kind", ["random", "duplicates", "rank_deficient"])
def test_gradcheck_in_float64(spd_tokens, backend, kind):
    tokens = spd_tokens(kind, 9)[:, :, :6].contiguous().requires_grad_()
    target = torch.randn(2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def loss(x):
        return log_euclidean_loss(x, target, backend=backend, reduction="none")

    assert torch.autograd.gradcheck(loss, tokens)
    assert torch.autograd.gradcheck(lambda x: spd_logm(token_spd(x), backend=backend), tokens)


def test_gradient_of_tokens_equals_the_chain_rule_by_hand(spd_tokens):
    tokens = spd_tokens("random", 7).requires_grad_()
    target = spd_logm(token_spd(spd_tokens("random", 7, seed=1)))
    log_euclidean_loss(tokens, target, backend="eigh").backward()

    lengths = tokens.detach().norm(dim=-1, keepdim=True)
    unit = tokens.detach() / lengths
    _, gradient = log_loss_op(reference_token_spd(tokens.detach()), target, 1.0, "eigh", True)
    along_unit = (gradient + gradient.mT) @ unit / (7 * 2)  # / n, and the mean over two crops
    expected = (along_unit - unit * (along_unit * unit).sum(dim=-1, keepdim=True)) / lengths
    assert float((tokens.grad - expected).abs().max()) <= DOUBLE_TOLERANCE


def test_loewner_matrix_is_exact_at_ties_and_near_them():
    values = [1.0, 1.0, 1.0 + 1e-6, 2.5, 2.5, 180.0]
    single = torch.tensor([values])
    matrix = loewner_matrix(single)[0]
    exact = [[log_divided_difference(float(a), float(b)) for b in single[0]] for a in single[0]]
    relative = (matrix.double() / torch.tensor(exact, dtype=torch.float64) - 1).abs()
    # The difference of two fp32 numbers within a factor of 2 is exact; four roundings remain.
    assert float(relative.max()) <= 4 * 2.0**-24


def test_autograd_through_eigh_is_nan_where_the_loewner_gradient_is_right():
    """Why the gradient is not left to autograd: of equal eigenvalues, here equal to the bit on every machine."""
    matrices = (2 * torch.eye(8, dtype=torch.float64))[None].requires_grad_()
    values, vectors = torch.linalg.eigh(matrices)
    ((vectors * values.log()[:, None, :]) @ vectors.mT).square().sum().backward()
    _, gradient = log_loss_op(matrices.detach(), torch.zeros_like(matrices), 1.0, "eigh", True)
    by_autograd = (matrices.grad + matrices.grad.mT) / 2
    assert bool(by_autograd.isnan().any())
    # d tr(log(A)^2) / dA = 2 log(A) inv(A).
    expected = torch.eye(8, dtype=torch.float64) * math.log(2.0)
    assert frobenius(gradient - expected) < DOUBLE_TOLERANCE


def test_inverse_by_triangular_solve_equals_the_inverse(spd_case):
    """The form of the Cholesky fallback on CUDA, where torch's cholesky_inverse is a host loop."""
    matrices = spd_case("near_degenerate", 64).matrices
    found = inverse_by_solve(torch.linalg.cholesky(matrices))
    # Backward stable, |A| <= 65, |A^-1| <= 1: n u kappa, as for the logarithm.
    assert frobenius(found - torch.linalg.inv(matrices.double())) <= 64 * 2.0**-24 * 65


@pytest.mark.parametrize("backend", ["eigh", "resolvent"])
def test_without_gradient_the_loss_is_the_same_and_no_gradient_is_made(spd_case, backend):
    case = spd_case("random", 36)
    with_gradient, _ = log_loss_op(case.matrices, case.target, 1.0, backend, True)
    without, gradient = log_loss_op(case.matrices, case.target, 1.0, backend, False)
    assert torch.equal(with_gradient, without)
    assert gradient.numel() == 0
