# mypy: disable-error-code="no-untyped-def"
"""Triton: all shifted inverses (A + t_j I)^-1 of a batch, one program a (matrix, shift), in fp32 accuracy.

A Cholesky-pivot sweep in tiles of TILE x TILE: for each pivot block k with T_kk = L L^T and W = L^-1,
P_i = T_ik W^T, T_il -= P_i P_l^T, T_ik = P_i W, T_kk = -W^T W. After all pivots T = -(A + t I)^-1. There is no
convergence loop and no branch on data. Only tiles on and below the diagonal are kept.

Products are three TF32 products of the high and low halves of both factors, which is as accurate as fp32.
Triton programs write tiles to global scratch and read them back after a barrier; the scratch of one program
stays in the L2 cache. A matrix that is not positive definite gives NaN through the square root.
"""

import triton
import triton.language as tl

from kernels.spd.triton_math import dot_fp32, high_half


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
