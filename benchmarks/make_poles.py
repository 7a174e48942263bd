"""Makes `poles.json`, minimax rational logarithms by exchange: `python -m benchmarks.make_poles`.

On [1 / sqrt(kappa), sqrt(kappa)] the best f(y) = c - sum_j r_j / (y + t_j) is odd in s = log y, so the poles
come in pairs (t, 1 / t) with residues (r, r / t^2), and c = sum_j r_j / (2 t_j). That leaves N parameters for
N poles, and the best f is the one whose error on 0 < s <= S = log(kappa) / 2 alternates at N + 1 points
(Chebyshev). The points are exchanged for the extrema of the error until they no longer move.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from kernels.spd.poles import KAPPA_STEP, MAX_ERROR, TABLE_PATH, TableRow

Array = NDArray[np.float64]

NUM_POLES = range(2, 11)
MAX_KAPPA = 2.0**20
NUM_GRID = 6001


@dataclass(frozen=True)
class Fit:
    """Log poles t < 1, their log residues, the middle log residue; and the largest error."""

    parameters: Array
    error: float


def expand(parameters: Array, num_poles: int) -> tuple[Array, Array]:
    """All poles and residues from the free parameters."""
    half = num_poles // 2
    poles = np.exp(parameters[:half])
    residues = np.exp(parameters[half : 2 * half])
    all_poles = np.concatenate([poles, 1 / poles])
    all_residues = np.concatenate([residues, residues / poles**2])
    if num_poles % 2:
        all_poles = np.append(all_poles, 1.0)
        all_residues = np.append(all_residues, np.exp(parameters[-1]))
    return all_poles, all_residues


def error_at(s: Array, parameters: Array, num_poles: int) -> Array:
    """f(exp(s)) - s, by the odd part r / 2 (y - t) / (t (y + t)) of each pole: no cancellation."""
    poles, residues = expand(parameters, num_poles)
    y = np.exp(s)[:, None]
    return (residues / (2 * poles) * (y - poles) / (y + poles)).sum(axis=1) - s


def jacobian_at(s: Array, parameters: Array, num_poles: int) -> Array:
    """Derivatives of the error in the parameters, by central differences."""
    columns = [
        (error_at(s, parameters + step, num_poles) - error_at(s, parameters - step, num_poles)) / 2e-6
        for step in 1e-6 * np.eye(len(parameters))
    ]
    return np.stack(columns, axis=1)


def alternating_extrema(error: Array, count: int) -> Array | None:
    """Indices of `count` extrema of alternating sign, the largest of each run; None if there are fewer."""
    change = np.flatnonzero(np.diff(np.sign(error)) != 0) + 1
    runs = np.split(np.arange(len(error)), change)
    peaks = [int(run[np.argmax(np.abs(error[run]))]) for run in runs]
    while len(peaks) > count:  # a surplus: drop the smaller end
        peaks = peaks[1:] if abs(error[peaks[0]]) < abs(error[peaks[-1]]) else peaks[:-1]
    return np.array(peaks) if len(peaks) == count else None


def solve_level(points: Array, parameters: Array, num_poles: int) -> Array | None:
    """Parameters whose error at `points` alternates at one level, by damped Newton steps."""
    signs = (-1.0) ** np.arange(len(points))

    def residual(p: Array, level: float) -> Array:
        return error_at(points, p, num_poles) - signs * level

    level = float(np.mean(signs * error_at(points, parameters, num_poles)))
    for _ in range(60):
        now = residual(parameters, level)
        system = np.column_stack([jacobian_at(points, parameters, num_poles), -signs])
        try:
            step = np.linalg.solve(system, -now)
        except np.linalg.LinAlgError:
            return None
        damping = min(1.0, 0.5 / max(np.abs(step[:-1]).max(), 1e-300))
        parameters = parameters + damping * step[:-1]
        level += damping * step[-1]
        if np.abs(step).max() < 1e-13:
            break
    return parameters


def exchange(half_width: float, start: Array, num_poles: int) -> Fit | None:
    """The minimax fit on |s| <= half_width from a start near it."""
    grid = half_width * np.sin(np.linspace(0, np.pi / 2, NUM_GRID))[1:]
    parameters = start
    best: Fit | None = None
    for _ in range(30):
        peaks = alternating_extrema(error_at(grid, parameters, num_poles), num_poles + 1)
        if peaks is None:
            break
        solved = solve_level(grid[peaks], parameters, num_poles)
        if solved is None or not np.isfinite(solved).all():
            break
        parameters = solved
        worst = float(np.abs(error_at(grid, parameters, num_poles)).max())
        if best is not None and worst >= best.error * (1 - 1e-9):
            break
        best = Fit(parameters, worst)
    return best


def first_guess(half_width: float, num_poles: int) -> Array:
    """Least squares from the trapezoidal rule in log t; its error alternates often enough to begin with."""
    nodes = np.linspace(-1, 1, num_poles) * (1.05 * half_width + 1)
    half = num_poles // 2
    spacing = np.log(nodes[1] - nodes[0])
    start = np.concatenate([nodes[:half], nodes[:half] + spacing, [spacing] if num_poles % 2 else []])
    points = half_width * np.sin(np.linspace(0, np.pi / 2, 400))[1:]
    fit = least_squares(
        lambda p: error_at(points, p, num_poles), start, jac=lambda p: jacobian_at(points, p, num_poles),
        method="lm", max_nfev=2000, xtol=1e-15, ftol=1e-15, gtol=1e-15,
    )  # fmt: skip
    return np.asarray(fit.x)


def table_row(kappa: float, num_poles: int) -> TableRow | None:
    """The fit as it is stored, or None where no alternating error was found (it is then below rounding)."""
    half_width = 0.5 * math.log(kappa)
    fit = exchange(half_width, first_guess(half_width, num_poles), num_poles)
    if fit is None:
        return None
    half = num_poles // 2
    order = np.argsort(fit.parameters[:half])
    poles = np.exp(fit.parameters[:half])[order]
    residues = np.exp(fit.parameters[half : 2 * half])[order]
    return TableRow(
        kappa=kappa,
        num_poles=num_poles,
        # The largest error may fall between two points of the grid.
        error=float(f"{fit.error * 1.001:.4g}"),
        half_poles=tuple(poles.tolist()),
        half_residues=tuple(residues.tolist()),
        middle_residue=float(np.exp(fit.parameters[-1])) if num_poles % 2 else None,
    )


def build_table() -> list[TableRow]:
    """For each interval length the fewest poles within the bound."""
    rows = []
    for step in range(4, round(math.log(MAX_KAPPA) / math.log(KAPPA_STEP)) + 1):
        made = (table_row(2.0 ** (step * math.log2(KAPPA_STEP)), num_poles) for num_poles in NUM_POLES)
        rows.append(next(row for row in made if row is not None and row.error <= MAX_ERROR))
    return rows


def main() -> None:
    """Write the table, one row a line."""
    rows = build_table()
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    TABLE_PATH.write_text(f"[\n{lines}\n]\n")
    print(f"{TABLE_PATH}: {len(rows)} rows")


if __name__ == "__main__":
    main()
