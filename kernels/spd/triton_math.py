# mypy: disable-error-code="no-untyped-def"
"""Triton: fp32-accurate products, the tiles of a symmetric matrix, and the Loewner matrix of the logarithm."""

import triton
import triton.language as tl


def round_up(n: int, multiple: int) -> int:
    """The next multiple."""
    return -(-n // multiple) * multiple


def num_tile_pairs(n: int, tile: int) -> int:
    """Tiles on and below the diagonal of an n x n matrix."""
    tiles = round_up(n, tile) // tile
    return tiles * (tiles + 1) // 2


@triton.jit
def high_half(x):
    """x rounded to the 10 mantissa bits that TF32 keeps: x - high_half(x) is exact in fp32.

    Rounded, not cut off: of a cut-off half the rest has the sign of x, and the products of two rests, which are
    left out, together with the bits of a rest that TF32 drops, bias every sum by about 4 roundoffs of fp32.
    """
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def three_products(a, a_high, b, b_high):
    product = tl.dot(a - a_high, b_high, input_precision="tf32")
    product = tl.dot(a_high, b - b_high, product, input_precision="tf32")
    return tl.dot(a_high, b_high, product, input_precision="tf32")


@triton.jit
def dot_fp32(a, b):
    """a @ b by three TF32 products, small terms first."""
    return three_products(a, high_half(a), b, high_half(b))


@triton.jit
def dot_fp32_cut(a, b):
    """The same with halves cut off, an instruction less a number: for products of eigenvectors.

    Its bias of 4 roundoffs is below what an eigensolver leaves, and where tiles fill the registers the
    assembler spills for the rounding.
    """
    a_high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    b_high = (b.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return three_products(a, a_high, b, b_high)


@triton.jit
def lower_tile(pair):
    """Row and column of the tile number `pair` among (0,0), (1,0), (1,1), (2,0) ..."""
    row = ((tl.sqrt(8.0 * pair + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where((row + 1) * (row + 2) // 2 <= pair, row + 1, row)
    row = tl.where(row * (row + 1) // 2 > pair, row - 1, row)
    return row, pair - row * (row + 1) // 2


@triton.jit
def log_divided_difference(a, b):
    """(log a - log b) / (a - b), 1 / a at a = b, without cancellation.

    log1p(x) = log(u) x / (u - 1) with u = 1 + x rounded (Kahan), so no libdevice function is needed.
    """
    low = tl.minimum(a, b)
    x = (tl.maximum(a, b) - low) / low
    u = 1.0 + x
    tie = u == 1.0
    return tl.where(tie, 1.0, tl.log(u) / tl.where(tie, 1.0, u - 1.0)) / low
