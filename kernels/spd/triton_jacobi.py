# mypy: disable-error-code="no-untyped-def"
"""Triton: for n <= 64 eigendecomposition, logarithm, distance and gradient of a matrix in one program.

Two-sided Jacobi: in each step SIZE / 2 rotations on neighbouring pairs (2k, 2k + 1) annihilate a_2k,2k+1, then
rows and columns move one place on in the round robin (Brent and Luk, 1985), so that all pairs meet in SIZE - 1
steps, one sweep. The matrix and the vectors stay in registers throughout. The five products that follow pass
their operands through scratch that stays in the cache, because five unrolled products at once would spill.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.spd.triton_math import dot_fp32_cut, log_divided_difference

JACOBI_SWEEPS = 15
JACOBI_CONVERGED = 2.0**-44
"""Squared share of the off-diagonal part at which sweeps end: (2^-22)^2, the rounding of fp32."""
JACOBI_USABLE = 2.0**-32
"""A matrix above this share after the last sweep gives NaN, not a wrong number."""


def jacobi_options(size: int) -> dict[str, int]:
    """Warps that hold a size x size matrix in registers, and a pipeline depth, that spill nothing."""
    return {"num_warps": 4, "num_stages": 2} if size <= 32 else {"num_warps": 8, "num_stages": 1}


@triton.jit
def off_diagonal_square(a, SIZE: tl.constexpr):
    r = tl.arange(0, SIZE)
    return tl.sum(tl.where(r[:, None] != r[None, :], a * a, 0.0))


@triton.jit
def jacobi_step(a, v, SIZE: tl.constexpr):
    """Rotates all neighbouring pairs and moves the places one on; (a, v) -> (J^T a J, v J), permuted."""
    r = tl.arange(0, SIZE)
    even = (r % 2) == 0
    partner = r ^ 1
    source = tl.where(
        even,
        tl.where(r == 0, 0, tl.where(r == 2, 1, r - 2)),
        tl.where(r == SIZE - 1, SIZE - 2, r + 2),
    )
    diagonal = tl.sum(tl.where(r[:, None] == r[None, :], a, 0.0), 0)
    beside = tl.sum(tl.where(r[:, None] == partner[None, :], a, 0.0), 0)
    # Both members of a pair must take the same number, also where rounding has made a_pq and a_qp differ.
    beside = tl.where(even, beside, tl.gather(beside, partner, 0))
    other = tl.gather(diagonal, partner, 0)
    first = tl.where(even, diagonal, other)
    second = tl.where(even, other, diagonal)
    zero = beside == 0.0
    ratio = (second - first) / tl.where(zero, 1.0, 2.0 * beside)
    # A huge ratio overflows its square: the tangent is then 0, as it should be.
    tangent = tl.where(ratio >= 0.0, 1.0, -1.0) / (tl.abs(ratio) + tl.sqrt(1.0 + ratio * ratio))
    tangent = tl.where(zero, 0.0, tangent)
    cosine = 1.0 / tl.sqrt(1.0 + tangent * tangent)
    sine = tl.where(even, -cosine * tangent, cosine * tangent)

    partner_column = tl.broadcast_to(partner[None, :], (SIZE, SIZE))
    partner_row = tl.broadcast_to(partner[:, None], (SIZE, SIZE))
    source_column = tl.broadcast_to(source[None, :], (SIZE, SIZE))
    source_row = tl.broadcast_to(source[:, None], (SIZE, SIZE))
    a = a * cosine[None, :] + tl.gather(a, partner_column, 1) * sine[None, :]
    a = a * cosine[:, None] + tl.gather(a, partner_row, 0) * sine[:, None]
    v = v * cosine[None, :] + tl.gather(v, partner_column, 1) * sine[None, :]
    a = tl.gather(tl.gather(a, source_column, 1), source_row, 0)
    v = tl.gather(v, source_column, 1)
    return a, v


@triton.jit
def product(left, left_row, left_column, right, right_row, right_column, SIZE: tl.constexpr):
    """left @ right of two SIZE x SIZE matrices in memory with these strides."""
    r = tl.arange(0, SIZE)
    depth = tl.arange(0, 16)
    result = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, SIZE, 16):
        at = k + depth
        x = tl.load(left + r[:, None] * left_row + at[None, :] * left_column)
        y = tl.load(right + at[:, None] * right_row + r[None, :] * right_column)
        result += dot_fp32_cut(x, y)
    return result


@triton.jit
def store_for_all(pointers, value):
    """Stores for the whole program to read, after all of it has read what was there before."""
    tl.debug_barrier()
    tl.store(pointers, value)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["n"])
def jacobi_kernel(
    matrices,
    given,
    loss,
    out,
    scratch,
    n,
    SIZE: tl.constexpr,
    MAX_SWEEPS: tl.constexpr,
    CONVERGED: tl.constexpr,
    USABLE: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    PULLBACK: tl.constexpr,
):
    """One program a matrix [n, n], n <= SIZE (a power of two); padding is an identity that never rotates.

    HAS_TARGET: loss [b] = ||log A - given||^2, and WITH_GRADIENT out [b, n, n] = its gradient in A. PULLBACK:
    out = the gradient of <given, log A> for symmetric `given`. Neither: out = log A. Sweeps end when the
    squared off-diagonal part is below CONVERGED of the whole; above USABLE the matrix gives NaN. scratch:
    [b, 3, SIZE, SIZE].
    """
    b = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, SIZE)
    at = b * n * n + r[:, None] * n + r[None, :]
    inside = (r[:, None] < n) & (r[None, :] < n)
    on_diagonal = r[:, None] == r[None, :]
    identity = tl.where(on_diagonal, 1.0, 0.0)
    a = tl.where(inside, tl.load(matrices + at, mask=inside, other=0.0), identity)
    v = identity
    whole = tl.sum(a * a)
    off = off_diagonal_square(a, SIZE)
    sweep = 0
    while (sweep < MAX_SWEEPS) & (off > CONVERGED * whole):
        for _ in range(SIZE - 1):
            a, v = jacobi_step(a, v, SIZE)
        off = off_diagonal_square(a, SIZE)
        sweep += 1
    # Rounding leaves cosine^2 + sine^2 a little off 1 in each rotation. The product of these factors is the
    # squared length of the vector, and the same factor is in its eigenvalue.
    squares = tl.sum(v * v, 0)
    eigenvalues = tl.sum(tl.where(on_diagonal, a, 0.0), 0) / squares
    v /= tl.sqrt(squares)[None, :]
    # Not `off > ...`: a NaN or Inf in the matrix makes every comparison false and must give NaN too.
    eigenvalues = tl.where(off <= USABLE * whole, eigenvalues, float("nan"))

    basis = scratch + b * 3 * SIZE * SIZE  # V
    first = basis + SIZE * SIZE
    second = first + SIZE * SIZE
    tile = r[:, None] * SIZE + r[None, :]
    tl.store(basis + tile, v)
    if PULLBACK:
        upstream = tl.load(given + at, mask=inside, other=0.0)
    else:
        store_for_all(first + tile, v * tl.log(eigenvalues)[None, :])
        log = product(first, SIZE, 1, basis, 1, SIZE, SIZE)
        if HAS_TARGET:
            upstream = tl.where(inside, log - tl.load(given + at, mask=inside, other=0.0), 0.0)
            tl.store(loss + b, tl.sum(upstream * upstream))
            upstream *= 2.0
        else:
            tl.store(out + at, log, mask=inside)
    if WITH_GRADIENT or PULLBACK:
        store_for_all(first + tile, upstream)
        store_for_all(second + tile, product(basis, 1, SIZE, first, SIZE, 1, SIZE))
        inner = product(second, SIZE, 1, basis, SIZE, 1, SIZE)
        inner *= log_divided_difference(eigenvalues[:, None], eigenvalues[None, :])
        store_for_all(first + tile, inner)
        store_for_all(second + tile, product(basis, SIZE, 1, first, SIZE, 1, SIZE))
        tl.store(out + at, product(second, SIZE, 1, basis, 1, SIZE, SIZE), mask=inside)


def jacobi(matrices: Tensor, given: Tensor | None, mode: str) -> tuple[Tensor, Tensor]:
    """One launch of the eigendecomposition for n <= 64 with what follows it; (loss [b], out [b, n, n]).

    mode "log": out = log A. "loss" and "loss_and_gradient": against `given`. "pullback": out = the gradient of
    <given, log A>. What a mode does not give is empty.
    """
    batch, n, _ = matrices.shape
    matrices = matrices.contiguous()
    size = max(16, 1 << (n - 1).bit_length())
    loss = matrices.new_empty(batch if mode.startswith("loss") else 0)
    out = matrices.new_empty(0 if mode == "loss" else matrices.shape)
    jacobi_kernel[(batch,)](
        matrices,
        matrices if given is None else given.contiguous(),
        loss,
        out,
        matrices.new_empty(batch, 3, size, size),
        n,
        SIZE=size,
        MAX_SWEEPS=JACOBI_SWEEPS,
        CONVERGED=JACOBI_CONVERGED,
        USABLE=JACOBI_USABLE,
        HAS_TARGET=mode.startswith("loss"),
        WITH_GRADIENT=mode == "loss_and_gradient",
        PULLBACK=mode == "pullback",
        **jacobi_options(size),
    )
    return loss, out
