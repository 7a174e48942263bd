"""Small caches of synthetic crops for the cache's tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cache_tools.build import run_build
from cache_tools.layout import CodecName
from tests.cache_tools.synthetic import SyntheticReader, SyntheticTeacher, synthetic_request

BuildSmall = Callable[..., Path]


@pytest.fixture
def build_small(tmp_path: Path) -> BuildSmall:
    """Build a cache of 18 images in shards of 7, 7 and 4; returns its folder."""

    def build(name: str = "cache", *, codec: CodecName = "int8", view_sets: int = 1, seed: int = 0) -> Path:
        root = tmp_path / name
        request = synthetic_request(root, codec=codec, view_sets=view_sets, seed=seed)
        run_build(request, SyntheticTeacher(), SyntheticReader(seed=seed), progress=False)
        return root

    return build
