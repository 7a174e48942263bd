"""The order of rows in an epoch and each rank's share of a step: pure functions, free of the world size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from pipeline.philox import Domain, draw

DEFAULT_BLOCK = 512
DEFAULT_WINDOW = 32

_BLOCK_KEYS = 0
_ROW_KEYS = 1
# Keys are drawn in pieces that stay in the processor's second-level cache.
_PIECE = 16384


def epoch_order(
    num_rows: int,
    *,
    seed: int,
    epoch: int,
    block: int = DEFAULT_BLOCK,
    window: int | None = DEFAULT_WINDOW,
) -> npt.NDArray[np.int64]:
    """Permute rows: blocks of neighbours in random order, then all rows of `window` such blocks at random.

    Reads and cache fetches of a step stay within `window` blocks; rows were already shuffled when they were
    packed, so a window is class-mixed.

    Args:
        num_rows: rows to order.
        seed: 64-bit seed.
        epoch: epoch number.
        block: rows of a block.
        window: blocks of a window; None shuffles all rows together.

    Returns:
        int64 [num_rows], a permutation.

    Raises:
        UserError: no rows, or a block or window below 1.
    """
    if num_rows < 1 or block < 1 or (window is not None and window < 1):
        raise UserError(
            f"epoch order: {num_rows} rows, block {block}, window {window}. Each must be at least 1. "
            "Check the shards (`make verify-shards`) and the order's settings."
        )
    if window is None:
        return np.argsort(_keys(np.arange(num_rows), seed, epoch, _ROW_KEYS), kind="stable")
    num_blocks = -(-num_rows // block)
    blocks = np.argsort(_keys(np.arange(num_blocks), seed, epoch, _BLOCK_KEYS), kind="stable")
    order = np.empty(num_rows, np.int64)
    end = 0
    for first in range(0, num_blocks, window):
        starts = np.sort(blocks[first : first + window]) * block
        rows = (starts[:, None] + np.arange(block)).reshape(-1)
        rows = rows[rows < num_rows]
        begin, end = end, end + len(rows)
        order[begin:end] = rows[np.argsort(_keys(rows, seed, epoch, _ROW_KEYS), kind="stable")]
    return order


def rank_positions(step: int, *, rank: int, world_size: int, global_batch_size: int) -> range:
    """Positions in the epoch's order that a rank reads at a step: its contiguous slice of the global batch.

    Raises:
        UserError: the world size does not divide the global batch, or the rank is not below the world size.
    """
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank}: the world size is {world_size}. Ranks count from 0. Check the launcher.")
    if global_batch_size < 1 or global_batch_size % world_size:
        raise UserError(
            f"global batch of {global_batch_size}: the world size {world_size} does not divide it. "
            f"Each rank takes an equal slice. Choose a multiple of {world_size}."
        )
    share = global_batch_size // world_size
    start = step * global_batch_size + rank * share
    return range(start, start + share)


def _keys(rows: npt.NDArray[np.int64], seed: int, epoch: int, which: int) -> npt.NDArray[np.uint64]:
    keys = np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), _PIECE):
        piece = slice(start, start + _PIECE)
        words = draw(rows[piece].astype(np.uint64), which, 0, seed=seed, domain=Domain.ORDER, index=epoch)
        keys[piece] = words[..., 0] << np.uint64(32) | words[..., 1]
    return keys
