"""Errors of the logarithm and of its gradient in fp32 against float64, by regime of tokens, eps and backend.

python -m benchmarks.spd_accuracy [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks.bench_spd import CHANNELS
from benchmarks.results import append_rows
from benchmarks.synthetic import REGIMES, synthetic_tokens
from kernels.spd import spd_logm, token_spd
from kernels.spd.reference import reference_logm, reference_loss_and_gradient

RESULTS = Path(__file__).parent / "results" / "spd_accuracy.csv"
BACKENDS: tuple[Literal["eigh", "resolvent"], ...] = ("eigh", "resolvent")


@dataclass(frozen=True)
class AccuracyRow:
    """Relative Frobenius errors of fp32 against float64, largest of four crops."""

    regime: str
    backend: str
    device: str
    n: int
    eps: float
    log_error: float
    gradient_error: float


def accuracy(device: torch.device, n: int, eps: float) -> list[AccuracyRow]:
    """Errors of both backends on fp32 tokens, logarithm and gradient in the tokens' Gram matrix."""
    rows = []
    for regime in REGIMES:
        student = synthetic_tokens(regime, 4, n, CHANNELS, seed=5)
        target = spd_logm(token_spd(synthetic_tokens(regime, 4, n, 1024, seed=6), eps=eps), eps=eps)
        exact = token_spd(student, eps=eps)
        logs = torch.stack([reference_logm(matrix) for matrix in exact])
        gradients = torch.stack(
            [reference_loss_and_gradient(matrix, t)[1] for matrix, t in zip(exact, target, strict=True)]
        )
        for backend in BACKENDS:
            matrices = token_spd(student.float().to(device), eps=eps).requires_grad_()
            log = spd_logm(matrices, eps=eps, backend=backend)
            ((log - target.float().to(device)).square().sum() / n).backward()
            assert matrices.grad is not None
            log_error = _worst_relative(log.detach().cpu().double(), logs)
            gradient_error = _worst_relative(matrices.grad.cpu().double(), gradients)
            rows.append(AccuracyRow(regime, backend, device.type, n, eps, log_error, gradient_error))
    return rows


def _worst_relative(found: Tensor, exact: Tensor) -> float:
    error = (found - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))
    return float(f"{float(error.max()):.2g}")


def main() -> None:
    """Measure, print, and append to the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    rows = [row for eps in (1.0, 0.1, 0.01) for row in accuracy(device, 196, eps)]
    for row in rows:
        print(f"{row.regime:16}{row.backend:10}{row.eps:6}{row.log_error:10.1e}{row.gradient_error:10.1e}")
    append_rows(RESULTS, [asdict(row) for row in rows])


if __name__ == "__main__":
    main()
