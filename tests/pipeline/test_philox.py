"""Known answers of the random numbers, and their helpers at the edges."""

import math

import numpy as np
import pytest

from pipeline.philox import (
    RATIO_ENTRIES,
    RATIO_ONE,
    Domain,
    below,
    draw,
    happens,
    log_uniform_ratios,
    philox4x32,
)

# Random123's kat_vectors file, lines "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_of_random123(counter, key, result):
    words = philox4x32(*(np.array([c], np.uint64) for c in counter), key[0] | key[1] << 32)
    assert tuple(int(w[0]) for w in words) == result


def test_draw_places_seed_id_index_domain_view_and_block_as_documented():
    uid, seed = 0x0123456789ABCDEF, 0xFEDCBA9876543210
    words = draw(np.array([uid], np.uint64), 3, 258, seed=seed, domain=Domain.MASK, index=7)
    counter = (uid & 0xFFFFFFFF, uid >> 32, 7, 2 << 24 | 3 << 16 | 258)
    expected = philox4x32(*(np.array([c], np.uint64) for c in counter), seed)
    assert words.shape == (1, 4)
    assert [int(w) for w in words[0]] == [int(e[0]) for e in expected]


def test_a_batch_of_draws_equals_single_draws():
    uids = np.arange(5, dtype=np.uint64) * np.uint64(2**40 + 1)
    batch = draw(uids[:, None], np.arange(3), 4, seed=9, domain=Domain.FRESH, index=2)
    for i in range(5):
        for v in range(3):
            single = draw(uids[i : i + 1], v, 4, seed=9, domain=Domain.FRESH, index=2)
            assert np.array_equal(batch[i, v], single[0])


def test_probability_zero_never_happens_and_one_always():
    words = np.array([0, 1, 2**31, 2**32 - 1], np.uint64)
    assert not happens(words, 0.0).any()
    assert happens(words, 1.0).all()
    assert happens(words, 0.5).tolist() == [True, True, False, False]


def test_below_covers_its_range_and_nothing_else():
    words = np.array([0, 2**30, 2**31, 2**32 - 1], np.uint64)
    assert below(words, 4).tolist() == [0, 1, 2, 3]
    assert below(words, 1).tolist() == [0, 0, 0, 0]


def test_ratio_table_is_log_uniform_and_rounded():
    table = log_uniform_ratios(3 / 4, 4 / 3)
    i = np.array([0, 1, 2047, 2048, RATIO_ENTRIES - 1])
    exact = [RATIO_ONE * math.exp(math.log(0.75) + (k + 0.5) / RATIO_ENTRIES * math.log(16 / 9)) for k in i]
    assert table[i].tolist() == [round(x) for x in exact]
    assert np.all(np.diff(table) > 0)
    assert len(table) == RATIO_ENTRIES
