"""Splits labelled rows into a part to fit on and a held-out part, seeded and stratified by class."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from common.errors import UserError


def held_out_split(
    labels: npt.NDArray[np.integer], *, fraction: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Hold out `fraction` of the rows, each class in proportion.

    Rows are shuffled with the seed and sorted by class; evenly spaced places of that list are held out, so a
    class of c rows gives floor or ceil of c * fraction. A class of one row is never held out.

    Args:
        labels: class of each row [n], 0 or above.
        fraction: share to hold out, above 0 and at most 0.5.
        seed: decides which rows.

    Returns:
        (positions to fit on, positions held out), ascending int64; disjoint, together all rows.

    Raises:
        UserError: the fraction is out of range, a label is negative, or nothing would be held out.
    """
    if not 0 < fraction <= 0.5:
        raise UserError(f"held-out split: fraction {fraction}. It must be above 0 and at most 0.5.")
    labels = np.asarray(labels)
    if len(labels) and labels.min() < 0:
        raise UserError(
            f"held-out split: {int((labels < 0).sum())} of {len(labels)} rows have no class. "
            "A stratified split needs one. Leave unlabelled rows out."
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels) if len(labels) else np.zeros(0, dtype=np.int64)
    candidates = by_class[counts[labels[by_class]] > 1]
    take = round(len(candidates) * fraction)
    if take == 0:
        raise UserError(
            f"held-out split: {len(labels)} rows, of which {len(candidates)} are in a class of two or more, "
            f"leave none to hold out at a fraction of {fraction}. Give more labelled images a class."
        )
    places = ((np.arange(take) + 0.5) * len(candidates) / take).astype(np.int64)
    held = np.sort(candidates[places])
    keep = np.ones(len(labels), dtype=bool)
    keep[held] = False
    return np.flatnonzero(keep), held


def subset_rows(num_rows: int, *, limit: int | None, seed: int) -> npt.NDArray[np.int64]:
    """Row numbers 0..num_rows-1, or a seeded sample of `limit` of them, ascending."""
    if limit is None or limit >= num_rows:
        return np.arange(num_rows)
    if limit < 1:
        raise UserError(f"row limit {limit}: at least one row is needed. Give a positive number, or none.")
    return np.sort(np.random.default_rng(seed).choice(num_rows, size=limit, replace=False))
