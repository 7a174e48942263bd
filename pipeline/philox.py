"""Counter-based random numbers: a draw is a pure function of (seed, sample id, what it is for).

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), vectorised over numpy
arrays. Nothing has a state, so a draw does not depend on batch, order, worker or rank.

Counter layout, four 32-bit words:

    word 0   sample id, low half
    word 1   sample id, high half
    word 2   index: the view set (`Domain.FIXED`) or the epoch (all others)
    word 3   domain << 24 | view << 16 | block

The key is the 64-bit seed, low half first. A block is one evaluation: four 32-bit words.
"""

from __future__ import annotations

import enum
from decimal import Decimal, localcontext
from functools import lru_cache

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10

RATIO_ENTRIES = 4096
RATIO_ONE = 65536


class Domain(enum.IntEnum):
    """What a draw is for; two domains never share a counter."""

    FIXED = 0
    FRESH = 1
    MASK = 2
    ORDER = 3


def philox4x32(
    c0: UInt64Array, c1: UInt64Array, c2: UInt64Array, c3: UInt64Array, seed: int
) -> tuple[UInt64Array, UInt64Array, UInt64Array, UInt64Array]:
    """Apply ten Philox rounds to counters that broadcast against each other.

    Args:
        c0, c1, c2, c3: counter words, uint64 arrays with values below 2**32, broadcastable.
        seed: 64-bit key; the low half is the first key word.

    Returns:
        Four uint64 arrays of the broadcast shape, values below 2**32.
    """
    key_0, key_1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(_ROUNDS):
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0 = (product_1 >> _HALF) ^ c1 ^ np.uint64(key_0)
        c2 = (product_0 >> _HALF) ^ c3 ^ np.uint64(key_1)
        c1 = product_1 & _LOW
        c3 = product_0 & _LOW
        key_0 = (key_0 + _WEYL_0) & 0xFFFFFFFF
        key_1 = (key_1 + _WEYL_1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def draw(
    uids: UInt64Array,
    views: npt.ArrayLike,
    blocks: npt.ArrayLike,
    *,
    seed: int,
    domain: Domain,
    index: int,
) -> UInt64Array:
    """Draw 32-bit words for samples, views and blocks that broadcast against each other.

    Args:
        uids: sample ids, uint64.
        views: view numbers, 0 to 255.
        blocks: block numbers, 0 to 65535.
        seed: 64-bit seed.
        domain: what the draw is for.
        index: view set or epoch, 0 to 2**32 - 1.

    Returns:
        uint64 [..., 4], values below 2**32.
    """
    place = np.asarray(views, np.uint64) << np.uint64(16) | np.asarray(blocks, np.uint64)
    place = place | np.uint64(int(domain) << 24)
    words = philox4x32(uids & _LOW, uids >> _HALF, np.asarray(index, np.uint64), place, seed)
    shape = np.broadcast_shapes(*(w.shape for w in words))
    out = np.empty((*shape, 4), np.uint64)
    for i, word in enumerate(words):
        out[..., i] = word
    return out


def unit(words: UInt64Array) -> npt.NDArray[np.float64]:
    """Turn 32-bit words into float64 in [0, 1) with 24 bits; exact on every machine."""
    return (words >> np.uint64(8)).astype(np.float64) * 2.0**-24


def below(words: UInt64Array, limit: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Turn 32-bit words into integers in [0, limit) by multiply-high; `limit` is at most 2**32."""
    return (np.asarray(limit).astype(np.uint64) * words >> _HALF).astype(np.int64)


def happens(words: UInt64Array, probability: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """True with the given probability (0 never, 1 always), decided by an integer comparison."""
    return words < np.rint(np.asarray(probability, np.float64) * 2.0**32).astype(np.uint64)


@lru_cache(maxsize=16)
def log_uniform_ratios(low: float, high: float) -> npt.NDArray[np.int64]:
    """Aspect ratios in units of 1/65536, log-uniform over [low, high], int64 [4096].

    Indexing this table by the top 12 bits of a word replaces exp() at run time. `decimal` rounds exp and ln
    correctly, so the integers do not depend on the machine's mathematics library.
    """
    with localcontext() as context:
        context.prec = 40
        start, stop = Decimal(low).ln(), Decimal(high).ln()
        step = (stop - start) / RATIO_ENTRIES
        middles = ((start + step * (i + Decimal("0.5"))).exp() * RATIO_ONE for i in range(RATIO_ENTRIES))
        table = np.array([int(value.to_integral_value()) for value in middles], np.int64)
    table.setflags(write=False)
    return table


def ratio(words: UInt64Array, low: float, high: float) -> npt.NDArray[np.float64]:
    """Draw log-uniform aspect ratios (width over height) from the integer table."""
    return log_uniform_ratios(low, high)[(words >> np.uint64(20)).astype(np.int64)] / RATIO_ONE
