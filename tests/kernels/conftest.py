"""Token sets that are hard for a matrix logarithm, their float64 references, and bounds on fp32 rounding."""

import functools
import math
from dataclasses import dataclass

import pytest
import torch

from benchmarks.synthetic import synthetic_tokens
from kernels.spd import token_spd
from kernels.spd.poles import rational_log
from kernels.spd.reference import reference_logm, reference_loss_and_gradient

UNIT_ROUNDOFF = 2.0**-24
WRONG_FORMULA = 0.05
CROPS = 2


def make_tokens(kind, n, seed=0):
    """float64 [2, n, d] tokens of one kind; "ill_conditioned" comes with eps = 0.01, the others with 1."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        return torch.randn(CROPS, n, 48, dtype=torch.float64, generator=generator)
    if kind == "duplicates":
        tokens = torch.randn(CROPS, n, 48, dtype=torch.float64, generator=generator)
        tokens[:, : (n + 1) // 2] = tokens[:, :1]
        return tokens
    if kind == "rank_deficient":
        return torch.randn(CROPS, n, 5, dtype=torch.float64, generator=generator)
    if kind == "near_degenerate":
        return synthetic_tokens("near_duplicates", CROPS, n, 64, seed=seed)
    return synthetic_tokens("peaky", CROPS, n, 64, seed=seed)


KINDS = ("random", "duplicates", "rank_deficient", "near_degenerate", "ill_conditioned")


@dataclass(frozen=True)
class Case:
    """fp32 matrices and targets, and what float64 makes of exactly these numbers."""

    eps: float
    matrices: torch.Tensor
    target: torch.Tensor
    logs: torch.Tensor
    losses: torch.Tensor
    gradients: torch.Tensor

    @property
    def n(self):
        return self.matrices.shape[-1]

    @property
    def rounding(self):
        """Bound on the Frobenius error of an fp32 logarithm of the given fp32 matrices.

        A backward stable method gives log(A + D), |D|_2 <= p u |A|_2 with p about sqrt(n) (n^2 roundings an
        entry of which the signs are random). The derivative of log is at most 1 / eps, and the Frobenius norm
        at most sqrt(n) times the 2-norm: n u (n + eps) / eps. The last term is the rounding of the result.
        """
        condition = (self.n + self.eps) / self.eps
        return UNIT_ROUNDOFF * (self.n * condition + 8 * float(self.logs.norm()))

    @property
    def distance(self):
        """Largest |log A - T|_F of the batch."""
        return float((self.logs - self.target).norm(dim=(-2, -1)).max())

    def loss_bound(self, log_error):
        """| |E + D|^2 - |E|^2 | / n for |D| <= log_error, and the rounding of the sum."""
        squares = self.distance**2
        return (2 * self.distance * log_error + log_error**2 + 8 * UNIT_ROUNDOFF * squares) / self.n

    def gradient_bound(self, log_error):
        """An error in log A enters through divided differences <= 1 / eps; one of A also through them.

        At small eps that says little, so a share of the gradient's norm bounds it too: a formula with a wrong
        factor, order or transpose is further off. (One token has a constant matrix and no gradient.)
        """
        bound = 2 / (self.n * self.eps) * log_error * (1 + self.distance)
        share = WRONG_FORMULA * float(self.gradients.norm(dim=(-2, -1)).max())
        return min(bound, share) if self.n > 1 else bound


@functools.cache
def build_case(kind, n):
    eps = 0.01 if kind == "ill_conditioned" else 1.0
    matrices = token_spd(make_tokens(kind, n, seed=n).float(), eps=eps)
    teacher = token_spd(synthetic_tokens("typical", CROPS, n, 96, seed=n + 1), eps=eps)
    target = torch.stack([reference_logm(matrix) for matrix in teacher]).float()
    results = [reference_loss_and_gradient(a, t) for a, t in zip(matrices, target, strict=True)]
    return Case(
        eps=eps,
        matrices=matrices,
        target=target,
        logs=torch.stack([reference_logm(matrix) for matrix in matrices]),
        losses=torch.tensor([loss for loss, _ in results], dtype=torch.float64),
        gradients=torch.stack([gradient for _, gradient in results]),
    )


@pytest.fixture(scope="session")
def spd_case():
    """(kind, n) -> Case."""
    return build_case


@pytest.fixture(scope="session")
def spd_tokens():
    """(kind, n, seed) -> float64 tokens."""
    return make_tokens


@dataclass(frozen=True)
class Derivatives:
    """Of f - log over the interval of the table: the largest value and slope, on a dense grid."""

    value: float
    slope: float


@pytest.fixture(scope="session")
def rational_error():
    """(eps, n) -> Derivatives: what the rational function adds to the rounding."""

    @functools.cache
    def measure(eps, n):
        rational = rational_log(eps, n)
        x = torch.exp(torch.linspace(math.log(rational.lower), math.log(rational.upper), 4001, dtype=torch.float64))
        poles = torch.tensor(rational.poles, dtype=torch.float64)
        residues = torch.tensor(rational.residues, dtype=torch.float64)
        value = rational.constant - (residues / (x[:, None] + poles)).sum(dim=1) - x.log()
        slope = (residues / (x[:, None] + poles) ** 2).sum(dim=1) - 1 / x
        return Derivatives(float(value.abs().max()), float(slope.abs().max()))

    return measure
