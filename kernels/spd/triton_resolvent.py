# mypy: disable-error-code="no-untyped-def"
"""Triton: all shifted inverses (A + t_j I)^-1 of a batch in fp32 accuracy, and from them logarithm, distance, gradient.

The inverses: one program a (matrix, shift).

A Cholesky-pivot sweep in tiles of TILE x TILE: for each pivot block k with T_kk = L L^T and W = L^-1,
P_i = T_ik W^T, T_il -= P_i P_l^T, T_ik = P_i W, T_kk = -W^T W. After all pivots T = -(A + t I)^-1. There is no
convergence loop and no branch on data. Only tiles on and below the diagonal are kept.

Products are three TF32 products of the high and low halves of both factors, which is as accurate as fp32.
Triton programs write tiles to global scratch and read them back after a barrier; the scratch of one program
stays in the L2 cache. A matrix that is not positive definite gives NaN through the square root.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.spd.poles import RationalLog
from kernels.spd.triton_math import dot_fp32, high_half, lower_tile, num_tile_pairs, round_up

RESOLVENT_TILE = 32
RESOLVENT_OPTIONS = {"num_warps": 4, "num_stages": 1}
COMBINE_OPTIONS = {"num_warps": 4, "num_stages": 2}
OPERAND_DTYPE = torch.float16
"""Of the operands of the gradient products: below 1 at eps = 1, below 600 at any eps; digits matter, not range."""


@triton.jit
def inverse_cholesky(block, TILE: tl.constexpr):
    """W = L^-1 of a block L L^T, by eliminating the block and the identity together."""
    index = tl.arange(0, TILE)
    w = tl.where(index[:, None] == index[None, :], 1.0, 0.0)
    for k in range(TILE):
        at_k = index == k
        row = tl.sum(tl.where(at_k[:, None], block, 0.0), 0)
        w_row = tl.sum(tl.where(at_k[:, None], w, 0.0), 0)
        scale = 1.0 / tl.sqrt(tl.sum(tl.where(at_k, row, 0.0), 0))
        w_row = w_row * scale
        column = tl.where(index > k, row * scale, 0.0)
        block = block - column[:, None] * column[None, :]
        w = tl.where(at_k[:, None], w_row[None, :], w - column[:, None] * w_row[None, :])
    return w


@triton.jit
def load_shifted(matrix, work, shift, n, num_tiles, TILE: tl.constexpr):
    """Copies the lower tiles of A + shift I to the scratch; padding rows get the identity."""
    r = tl.arange(0, TILE)
    size = num_tiles * TILE
    for i in range(num_tiles):
        for k in range(i + 1):
            row = (i * TILE + r)[:, None]
            column = (k * TILE + r)[None, :]
            x = tl.load(matrix + row * n + column, mask=(row < n) & (column < n), other=0.0)
            x += tl.where(row == column, tl.where(row < n, shift, 1.0), 0.0)
            tl.store(work + row * size + column, x)


@triton.jit(do_not_specialize=["n", "num_tiles"])
def resolvent_kernel(matrices, work, panels, poles, n, num_tiles, NUM_POLES: tl.constexpr, TILE: tl.constexpr):
    """matrices [b, n, n] -> lower tiles of -(A + t_j I)^-1 in work [b, NUM_POLES, size, size].

    size = num_tiles * TILE; panels [b, NUM_POLES, size, TILE] is scratch; poles is a tuple of numbers.
    """
    program = tl.program_id(0)
    j = program % NUM_POLES
    size = num_tiles * TILE
    matrix = matrices + (program // NUM_POLES).to(tl.int64) * n * n
    work += program.to(tl.int64) * size * size
    panels += program.to(tl.int64) * size * TILE
    shift = 0.0
    for index in tl.static_range(NUM_POLES):
        shift = tl.where(j == index, poles[index], shift)
    load_shifted(matrix, work, shift, n, num_tiles, TILE)
    tl.debug_barrier()

    r = tl.arange(0, TILE)
    at = r[:, None] * size + r[None, :]  # a tile of the work matrix
    at_panel = r[:, None] * TILE + r[None, :]
    for k in range(num_tiles):
        pivot = work + k * TILE * size + k * TILE
        w = inverse_cholesky(tl.load(pivot + at), TILE)
        w_t = tl.trans(w)
        for i in range(num_tiles):
            if i != k:
                if i > k:
                    x = tl.load(work + i * TILE * size + k * TILE + at)
                else:
                    x = tl.trans(tl.load(work + k * TILE * size + i * TILE + at))
                tl.store(panels + i * TILE * TILE + at_panel, dot_fp32(x, w_t))
        tl.debug_barrier()
        for i in range(num_tiles):
            if i != k:
                p_i = tl.load(panels + i * TILE * TILE + at_panel)
                high_i = high_half(p_i)
                low_i = p_i - high_i
                for m in range(i + 1):
                    if m != k:
                        p_m = tl.load(panels + m * TILE * TILE + at_panel)
                        high_m = high_half(p_m)
                        low_m = tl.trans(p_m - high_m)
                        high_m = tl.trans(high_m)
                        update = tl.dot(low_i, high_m, input_precision="tf32")
                        update = tl.dot(high_i, low_m, update, input_precision="tf32")
                        update = tl.dot(high_i, high_m, update, input_precision="tf32")
                        tile = work + i * TILE * size + m * TILE + at
                        tl.store(tile, tl.load(tile) - update)
                x = dot_fp32(p_i, w)
                if i > k:
                    tl.store(work + i * TILE * size + k * TILE + at, x)
                else:
                    tl.store(work + k * TILE * size + i * TILE + at, tl.trans(x))
        tl.store(pivot + at, -dot_fp32(w_t, w))
        tl.debug_barrier()


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


def _inverses(matrices: Tensor, rational: RationalLog) -> Tensor:
    """Lower tiles of the negative shifted inverses, [b, poles, size, size]."""
    batch, n, _ = matrices.shape
    num_poles = len(rational.poles)
    size = round_up(n, RESOLVENT_TILE)
    work = matrices.new_empty(batch, num_poles, size, size)
    panels = matrices.new_empty(batch, num_poles, size, RESOLVENT_TILE)
    resolvent_kernel[(batch * num_poles,)](
        matrices.contiguous(),
        work,
        panels,
        rational.poles,
        n,
        size // RESOLVENT_TILE,
        NUM_POLES=num_poles,
        TILE=RESOLVENT_TILE,
        **RESOLVENT_OPTIONS,
    )
    return work


def _combine(
    work: Tensor,
    rational: RationalLog,
    n: int,
    *,
    target: Tensor | None = None,
    log: Tensor | None = None,
    partials: Tensor | None = None,
    upstream: Tensor | None = None,
    operands: Tensor | None = None,
) -> None:
    batch, num_poles, size, _ = work.shape
    # A pointer that a variant of the kernel does not use is any pointer.
    combine_kernel[(num_tile_pairs(n, RESOLVENT_TILE), batch)](
        work,
        work if target is None else target,
        work if log is None else log,
        work if partials is None else partials,
        work if upstream is None else upstream,
        work if operands is None else operands,
        rational.residues,
        rational.constant,
        n,
        size // RESOLVENT_TILE,
        round_up(n, 16),
        NUM_POLES=num_poles,
        TILE=RESOLVENT_TILE,
        HAS_TARGET=target is not None,
        WRITE_LOG=log is not None,
        WRITE_OPERANDS=operands is not None,
        **COMBINE_OPTIONS,
    )


def resolvent_logm(matrices: Tensor, rational: RationalLog) -> Tensor:
    """f(A), [b, n, n]."""
    log = torch.empty_like(matrices, memory_format=torch.contiguous_format)
    _combine(_inverses(matrices, rational), rational, matrices.shape[-1], log=log)
    return log


def resolvent_loss(matrices: Tensor, target: Tensor, rational: RationalLog, with_grad: bool) -> tuple[Tensor, Tensor]:
    """||f(A) - T||^2, [b], and its gradient in A, [b, n, n] (or [0] if not wanted)."""
    batch, n, _ = matrices.shape
    work = _inverses(matrices, rational)
    partials = matrices.new_empty(batch, num_tile_pairs(n, RESOLVENT_TILE))
    target = target.contiguous()
    if not with_grad:
        _combine(work, rational, n, target=target, partials=partials)
        return partials.sum(dim=1), matrices.new_empty(0)
    padded = round_up(n, 16)
    upstream = matrices.new_empty(batch, padded, padded, dtype=OPERAND_DTYPE)
    operands = matrices.new_empty(batch, n, len(rational.poles), padded, dtype=OPERAND_DTYPE)
    _combine(work, rational, n, target=target, partials=partials, upstream=upstream, operands=operands)
    return partials.sum(dim=1), _pullback(operands, upstream)


def resolvent_logm_backward(matrices: Tensor, upstream: Tensor, rational: RationalLog) -> Tensor:
    """sum_j rho_j R_j G R_j for symmetric G, all [b, n, n]."""
    batch, n, _ = matrices.shape
    padded = round_up(n, 16)
    operands = matrices.new_empty(batch, n, len(rational.poles), padded, dtype=OPERAND_DTYPE)
    _combine(_inverses(matrices, rational), rational, n, operands=operands)
    # A gradient from outside has any scale: bring it to that of the operands, exactly, by a power of two.
    peak = upstream.abs().amax(dim=(-2, -1), keepdim=True)
    scale = torch.exp2(torch.floor(torch.log2(torch.where(peak > 0, peak, 1.0))))
    padding = (0, padded - n, 0, padded - n)
    scaled = torch.nn.functional.pad(upstream / scale, padding).to(OPERAND_DTYPE)
    return _pullback(operands, scaled) * scale


def _pullback(operands: Tensor, upstream: Tensor) -> Tensor:
    """sum_j R'_j G R'_j: operands [b, n, poles, padded], the R'_j side by side; see resolvent._pullback."""
    batch, n, num_poles, padded = operands.shape
    products = torch.bmm(operands.view(batch, n * num_poles, padded), upstream)
    products = products.view(batch, n, num_poles * padded)
    side_by_side = operands.view(batch, n, num_poles * padded)
    if operands.device.type == "cuda":
        return torch.bmm(products, side_by_side.mT, out_dtype=torch.float32)
    return torch.bmm(products.float(), side_by_side.mT.float())
