# mypy: disable-error-code="no-untyped-def"
"""Triton: from the shifted inverses the logarithm, the distance, and the 16-bit operands of the gradient."""

import triton
import triton.language as tl

from kernels.spd.triton_math import lower_tile


@triton.jit(do_not_specialize=["n", "num_tiles"])
def combine_kernel(
    work,
    target,
    log,
    partials,
    upstream,
    operands,
    residues,
    constant,
    n,
    num_tiles,
    padded,
    NUM_POLES: tl.constexpr,
    TILE: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    WRITE_LOG: tl.constexpr,
    WRITE_OPERANDS: tl.constexpr,
):
    """From the inverses everything else, one program a (matrix, tile on or below the diagonal).

    WRITE_LOG: log [b, n, n] = constant I - sum_j residues[j] R_j. HAS_TARGET: partials [b, tiles] of
    ||log - target||^2. WRITE_OPERANDS: operands [b, n, NUM_POLES, padded], sqrt(residues[j]) R_j side by side;
    with a target also upstream [b, padded, padded] = 2 (log - target), symmetric, zero in the padding.
    """
    pair = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    i, m = lower_tile(pair)
    r = tl.arange(0, TILE)
    row = (i * TILE + r)[:, None]
    column = (m * TILE + r)[None, :]
    row_t = (m * TILE + r)[:, None]
    column_t = (i * TILE + r)[None, :]
    inside = (row < n) & (column < n)
    inside_t = (row_t < n) & (column_t < n)
    size = num_tiles * TILE
    off_diagonal = i != m

    value = tl.where(row == column, constant, 0.0) + tl.zeros((TILE, TILE), tl.float32)
    for j in tl.static_range(NUM_POLES):
        x = tl.load(work + (b * NUM_POLES + j) * size * size + row * size + column)  # -R_j
        value += residues[j] * x
        if WRITE_OPERANDS:
            scaled = (-tl.sqrt(residues[j] + 0.0) * x).to(operands.dtype.element_ty)
            base = operands + (b * n * NUM_POLES + j) * padded
            tl.store(base + row * (NUM_POLES * padded) + column, scaled, mask=(row < n) & (column < padded))
            tl.store(
                base + row_t * (NUM_POLES * padded) + column_t,
                tl.trans(scaled),
                mask=(row_t < n) & (column_t < padded) & off_diagonal,
            )
    if WRITE_LOG:
        tl.store(log + b * n * n + row * n + column, value, mask=inside)
        tl.store(log + b * n * n + row_t * n + column_t, tl.trans(value), mask=inside_t & off_diagonal)
    if HAS_TARGET:
        there = tl.load(target + b * n * n + row * n + column, mask=inside, other=0.0)
        mirrored = tl.trans(tl.load(target + b * n * n + row_t * n + column_t, mask=inside_t, other=0.0))
        difference = tl.where(inside, value - there, 0.0)
        difference_t = tl.where(inside, value - mirrored, 0.0)
        squares = difference * difference + tl.where(off_diagonal, difference_t * difference_t, 0.0)
        tl.store(partials + b * tl.num_programs(0) + pair, tl.sum(squares))
        if WRITE_OPERANDS:
            both = (difference + difference_t).to(upstream.dtype.element_ty)  # 2 x the symmetric part
            base = upstream + b * padded * padded
            tl.store(base + row * padded + column, both, mask=(row < padded) & (column < padded))
            tl.store(
                base + row_t * padded + column_t,
                tl.trans(both),
                mask=(row_t < padded) & (column_t < padded) & off_diagonal,
            )
