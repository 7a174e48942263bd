"""CRC-32C: against the published check value, zarr's own library, and itself continued."""

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_tools import shard_file


def test_check_value_of_the_standard() -> None:
    assert shard_file.crc32c(b"123456789") == 0xE3069283  # RFC 3720, B.4 and the CRC catalogue


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_continued_checksum_equals_the_whole(first: bytes, second: bytes) -> None:
    assert shard_file.crc32c(second, shard_file.crc32c(first)) == google_crc32c.value(first + second)


@pytest.mark.parametrize("bundled", [True, False])
def test_rows_of_a_strided_array_match_the_binding(bundled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not bundled:
        monkeypatch.setattr(shard_file, "_library", lambda: None)
    elif shard_file._library() is None:
        pytest.skip("this build of google_crc32c ships no separate library")
    rows = np.random.default_rng(0).integers(0, 256, (9, 40), np.uint8)[::2, 3:36]
    expected = [google_crc32c.value(row.tobytes()) for row in rows]
    assert shard_file.crc32c_rows(rows).tolist() == expected
    assert shard_file.crc32c(np.ascontiguousarray(rows)) == google_crc32c.value(rows.tobytes())
