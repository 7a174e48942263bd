# mypy: disable-error-code="no-untyped-def"
"""Triton: log map with distance, and Loewner scaling, fused into the products around an eigensolver.

For n > 64 the eigensolver is cuSOLVER's. Its eigenvalues and vectors enter two kernels whose programs each
own one tile on or below the diagonal of a symmetric result, so half of the products are never computed, and
neither the scaled vectors, nor the logarithm, nor the Loewner matrix are written to memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.spd.triton_math import dot_fp32_cut, log_divided_difference, lower_tile, num_tile_pairs

SPECTRAL_TILE = 64
SPECTRAL_DEPTH = 32
SPECTRAL_OPTIONS = {"num_warps": 8, "num_stages": 3}


@triton.jit
def load_tile(base, row, column, row_stride, column_stride, n):
    """Entries (row, column) of an n x n matrix with these strides, zero outside."""
    at = row[:, None] * row_stride + column[None, :] * column_stride
    return tl.load(base + at, mask=(row[:, None] < n) & (column[None, :] < n), other=0.0)


@triton.jit(do_not_specialize=["n"])
def log_map_kernel(
    vectors,
    eigenvalues,
    target,
    out,
    partials,
    n,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    WRITE: tl.constexpr,
):
    """out [b, n, n] = U diag(log lambda) U^T, or with a target twice the symmetric part of its difference.

    vectors [b, n, n] (columns), eigenvalues [b, n]. HAS_TARGET: partials [b, tiles] of ||log - target||^2;
    without WRITE nothing else is written.
    """
    pair = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    i, m = lower_tile(pair)
    r = tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    row = i * TILE + r
    column = m * TILE + r
    base = b * n * n
    value = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, n, DEPTH):
        at = k + depth
        left = load_tile(vectors + base, row, at, n, 1, n)
        right = load_tile(vectors + base, at, column, 1, n, n)
        logs = tl.log(tl.load(eigenvalues + b * n + at, mask=at < n, other=1.0))
        value += dot_fp32_cut(left * logs[None, :], right)

    inside = (row[:, None] < n) & (column[None, :] < n)
    inside_t = (column[:, None] < n) & (row[None, :] < n)
    at = base + row[:, None] * n + column[None, :]
    at_t = base + column[:, None] * n + row[None, :]
    off_diagonal = i != m
    if HAS_TARGET:
        difference = tl.where(inside, value - tl.load(target + at, mask=inside, other=0.0), 0.0)
        mirrored = tl.trans(tl.load(target + at_t, mask=inside_t, other=0.0))
        difference_t = tl.where(inside, value - mirrored, 0.0)
        squares = difference * difference + tl.where(off_diagonal, difference_t * difference_t, 0.0)
        tl.store(partials + b * tl.num_programs(0) + pair, tl.sum(squares))
        value = difference + difference_t
    if WRITE:
        tl.store(out + at, value, mask=inside)
        tl.store(out + at_t, tl.trans(value), mask=inside_t & off_diagonal)


@triton.jit(do_not_specialize=["n"])
def loewner_kernel(vectors, product, eigenvalues, out, n, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """out [b, n, n] = Phi o (U^T product), where product = G U for a symmetric G, so the result is symmetric."""
    pair = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    i, m = lower_tile(pair)
    r = tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    row = i * TILE + r
    column = m * TILE + r
    base = b * n * n
    value = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, n, DEPTH):
        at = k + depth
        left = load_tile(vectors + base, row, at, 1, n, n)
        right = load_tile(product + base, at, column, n, 1, n)
        value += dot_fp32_cut(left, right)

    of_row = tl.load(eigenvalues + b * n + row, mask=row < n, other=1.0)
    of_column = tl.load(eigenvalues + b * n + column, mask=column < n, other=1.0)
    value *= log_divided_difference(of_row[:, None], of_column[None, :])
    inside = (row[:, None] < n) & (column[None, :] < n)
    tl.store(out + base + row[:, None] * n + column[None, :], value, mask=inside)
    tl.store(
        out + base + column[:, None] * n + row[None, :],
        tl.trans(value),
        mask=(column[:, None] < n) & (row[None, :] < n) & (i != m),
    )


def log_map(eigenvalues: Tensor, vectors: Tensor, target: Tensor | None, write: bool) -> tuple[Tensor, Tensor]:
    """(distance [b], log A) from eigenvalues [b, n] and vectors [b, n, n]; with a target 2 (log A - T) instead."""
    batch, n = eigenvalues.shape
    pairs = num_tile_pairs(n, SPECTRAL_TILE)
    vectors = vectors.contiguous()
    partials = eigenvalues.new_empty(batch, pairs if target is not None else 0)
    out = vectors.new_empty(vectors.shape if write else 0)
    log_map_kernel[(pairs, batch)](
        vectors,
        eigenvalues.contiguous(),
        vectors if target is None else target.contiguous(),
        out,
        partials,
        n,
        TILE=SPECTRAL_TILE,
        DEPTH=SPECTRAL_DEPTH,
        HAS_TARGET=target is not None,
        WRITE=write,
        **SPECTRAL_OPTIONS,
    )
    return partials.sum(dim=1), out


def spectral_gradient(eigenvalues: Tensor, vectors: Tensor, upstream: Tensor) -> Tensor:
    """U (Phi o (U^T G U)) U^T for symmetric G."""
    batch, n = eigenvalues.shape
    vectors = vectors.contiguous()
    inner = torch.empty_like(vectors)
    loewner_kernel[(num_tile_pairs(n, SPECTRAL_TILE), batch)](
        vectors,
        upstream @ vectors,
        eigenvalues.contiguous(),
        inner,
        n,
        TILE=SPECTRAL_TILE,
        DEPTH=SPECTRAL_DEPTH,
        **SPECTRAL_OPTIONS,
    )
    return vectors @ inner @ vectors.mT
