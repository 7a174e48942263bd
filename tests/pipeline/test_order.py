"""The epoch's order: a permutation, local within a window, free of the world size."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from pipeline.order import epoch_order, rank_positions

# A resumed run must go on in the order of the run before.
GOLDEN_ORDER = "d4dbc49fbcf6a515086f076be89717726a39d131b9f414ceac45e1d99d161377"


@given(
    n=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 1000),
    block=st.integers(1, 600), window=st.none() | st.integers(1, 40),
)  # fmt: skip
@settings(deadline=None, max_examples=100)
def test_order_is_a_permutation(n, seed, epoch, block, window):
    order = epoch_order(n, seed=seed, epoch=epoch, block=block, window=window)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


def test_order_is_fixed_by_seed_and_epoch():
    base = epoch_order(1000, seed=1, epoch=2, block=10, window=4)
    assert np.array_equal(base, epoch_order(1000, seed=1, epoch=2, block=10, window=4))
    assert not np.array_equal(base, epoch_order(1000, seed=1, epoch=3, block=10, window=4))
    assert not np.array_equal(base, epoch_order(1000, seed=2, epoch=2, block=10, window=4))


def test_a_window_reads_from_its_own_blocks_only_and_mixes_them():
    block, window = 16, 4
    order = epoch_order(16 * 40, seed=3, epoch=0, block=block, window=window)
    seen = set()
    for chunk in order.reshape(-1, block * window):
        blocks = set((chunk // block).tolist())
        assert len(blocks) == window
        assert not blocks & seen
        seen |= blocks
        assert len(set((chunk[:block] // block).tolist())) > 1
    assert len(seen) == 40


def test_full_shuffle_spreads_rows_over_the_epoch():
    n = 20_000
    place = np.empty(n, np.int64)
    place[epoch_order(n, seed=5, epoch=1, window=None)] = np.arange(n)
    # The correlation of independent ranks has standard deviation 1 / sqrt(n).
    assert abs(np.corrcoef(np.arange(n), place)[0, 1]) < 5 / np.sqrt(n)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_ranks_together_read_the_same_global_batch_whatever_the_world_size(world_size):
    order = epoch_order(500, seed=1, epoch=0, block=32, window=4)
    for step in (0, 7):
        shares = [
            order[list(rank_positions(step, rank=r, world_size=world_size, global_batch_size=12))]
            for r in range(world_size)
        ]
        assert np.array_equal(np.concatenate(shares), order[step * 12 : (step + 1) * 12])


@pytest.mark.parametrize(
    ("rank", "world_size", "message"), [(0, 5, "does not divide it"), (3, 3, "rank 3"), (-1, 3, "rank -1")]
)
def test_an_uneven_split_is_refused(rank, world_size, message):
    with pytest.raises(UserError, match=message):
        rank_positions(0, rank=rank, world_size=world_size, global_batch_size=12)


@pytest.mark.parametrize("change", [{"num_rows": 0}, {"block": 0}, {"window": 0}])
def test_empty_orders_are_refused(change):
    arguments = {"num_rows": 10, "block": 4, "window": 2} | change
    with pytest.raises(UserError, match="Each must be at least 1"):
        epoch_order(arguments.pop("num_rows"), seed=0, epoch=0, **arguments)


def test_order_never_changes():
    order = epoch_order(10_000, seed=12345, epoch=7, block=64, window=8)
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest() == GOLDEN_ORDER
