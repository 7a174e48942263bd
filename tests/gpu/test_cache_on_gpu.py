"""The cache on a CUDA device: the same tokens as on the CPU, whatever overlaps with their copies."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cache_tools.build import run_build
from cache_tools.codec import codec_bound, decode_int8, encode_int8, rounding_bound
from cache_tools.read import TeacherCache
from tests.cache_tools.synthetic import SyntheticReader, SyntheticTeacher, synthetic_batch, synthetic_request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Two fp32 roundings may be one where the device fuses a multiplication and an addition.
FUSED_ROUNDING = 2.0**-22


@pytest.fixture
def cache(tmp_path: Path) -> TeacherCache:
    request = synthetic_request(tmp_path / "cache", shard_rows=(64, 64))
    run_build(request, SyntheticTeacher(), SyntheticReader(), progress=False)
    return TeacherCache.open(request.root)


def test_tokens_decoded_on_the_gpu_equal_those_of_the_cpu(cache: TeacherCache) -> None:
    batch = synthetic_batch(np.arange(100), 0)
    here, there = cache.fetch(batch), cache.fetch(batch, device="cuda", dtype=torch.float32)
    error = (there.patches.cpu() - here.patches).abs()
    assert bool((error <= FUSED_ROUNDING * (here.patches.abs() + 10)).all())
    assert torch.equal(there.cls.cpu(), here.cls)
    bf16 = cache.fetch(batch, device="cuda")
    assert bf16.patches.dtype == torch.bfloat16
    error = (bf16.patches.cpu().double() - here.patches.double()).abs()
    assert bool((error <= rounding_bound(here.patches, torch.bfloat16) * (1 + 2.0**-10) + 1e-5).all())


def test_buffers_are_not_overwritten_while_the_gpu_is_behind(cache: TeacherCache) -> None:
    batches = [synthetic_batch((np.arange(32) * (k + 1)) % 128, 0) for k in range(12)]
    expected = [cache.fetch(batch).cls for batch in batches]
    torch.cuda._sleep(200_000_000)  # about 0.1 s in which every fetch below is queued behind this
    fetched = [cache.fetch(batch, device="cuda", dtype=torch.float32) for batch in batches]
    for targets, cls in zip(fetched, expected, strict=True):
        assert torch.equal(targets.cls.cpu(), cls)


def test_encoding_on_the_gpu_keeps_the_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(8, 2, 196, 256, generator=generator) * 7 + 1
    mean, std = torch.full((256,), 1.0), torch.full((256,), 7.0)
    codes, scale = encode_int8(tokens.cuda(), mean.cuda(), std.cuda())
    decoded = decode_int8(codes, scale, mean.cuda(), std.cuda())
    error = (decoded.cpu().double() - tokens.double()).abs()
    assert bool((error <= codec_bound(scale.cpu(), mean, std)).all())
    on_cpu = encode_int8(tokens, mean, std)
    assert float((codes.cpu() != on_cpu[0]).float().mean()) < 1e-4 and torch.equal(scale.cpu(), on_cpu[1])
