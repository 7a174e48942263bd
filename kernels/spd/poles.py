"""Rational logarithms from the checked-in table: the fewest poles that keep to the error bound."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

TABLE_PATH = Path(__file__).with_name("poles.json")
KAPPA_STEP = 2.0**0.25
"""Ratio of neighbouring interval lengths in the table."""
MAX_ERROR = 5e-5
"""Bound on |f - log| over the spectrum. The fp32 Gram matrix itself is not known better at eps = 1."""
LOWER_SLACK = 2.0**-10
UPPER_SLACK = 2.0**-9
"""The interval is widened by these: products in TF32 move the spectrum of a Gram matrix by up to 2^-10 n."""


@dataclass(frozen=True)
class RationalLog:
    """f(x) = constant - sum_j residues[j] / (x + poles[j]), within `error` of log x on [lower, upper].

    All poles and residues are positive, so f is operator monotone, and injective on positive definite
    matrices: f(A) = f(B) only if A = B.
    """

    constant: float
    poles: tuple[float, ...]
    residues: tuple[float, ...]
    lower: float
    upper: float
    error: float

    def __call__(self, x: float) -> float:
        """f at one positive number."""
        return self.constant - math.fsum(r / (x + t) for t, r in zip(self.poles, self.residues, strict=True))


@dataclass(frozen=True)
class TableRow:
    """One fit on [1 / sqrt(kappa), sqrt(kappa)]: poles t < 1 and residues of the pairs, middle residue."""

    kappa: float
    num_poles: int
    error: float
    half_poles: tuple[float, ...]
    half_residues: tuple[float, ...]
    middle_residue: float | None

    def expanded(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """All poles in ascending order with their residues: (t, r), the middle (1, r), (1 / t, r / t^2)."""
        pairs = list(zip(self.half_poles, self.half_residues, strict=True))
        terms = pairs + [(1 / t, r / t**2) for t, r in pairs]
        if self.middle_residue is not None:
            terms.append((1.0, self.middle_residue))
        terms.sort()
        return tuple(t for t, _ in terms), tuple(r for _, r in terms)


@functools.cache
def load_table() -> tuple[TableRow, ...]:
    """All rows by kappa, each the fewest poles within `MAX_ERROR`."""
    return tuple(
        TableRow(
            kappa=row["kappa"],
            num_poles=row["num_poles"],
            error=row["error"],
            half_poles=tuple(row["half_poles"]),
            half_residues=tuple(row["half_residues"]),
            middle_residue=row["middle_residue"],
        )
        for row in json.loads(TABLE_PATH.read_text())
    )


@functools.cache
def rational_log(eps: float, n: int) -> RationalLog:
    """The fewest poles within `MAX_ERROR` of the logarithm on [eps, n + eps], slightly widened.

    The table reaches condition numbers (n + eps) / eps of 2^20: eps from 0.001 for n up to 1,000, from 0.01 for n up
    to 10,000. Raises ValueError beyond it.
    """
    lower = eps * (1 - LOWER_SLACK)
    kappa = (n + eps) * (1 + UPPER_SLACK) / lower
    row = min((row for row in load_table() if row.kappa >= kappa), key=lambda row: row.kappa, default=None)
    if row is None:
        raise ValueError(
            f"eps = {eps}, n = {n}: no rational logarithm of the table covers a condition "
            f"number of {kappa:.3g} within {MAX_ERROR:g}. Use backend='eigh' or a larger eps."
        )
    poles, residues = row.expanded()
    scale = lower * math.sqrt(row.kappa)
    constant = math.log(scale) + math.fsum(r / (2 * t) for t, r in zip(poles, residues, strict=True))
    return RationalLog(
        constant=constant,
        poles=tuple(scale * t for t in poles),
        residues=tuple(scale * r for r in residues),
        lower=lower,
        upper=lower * row.kappa,
        error=row.error,
    )
