"""The codecs: error bounds that no data exceed, and errors small enough for the losses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cache_tools.codec import (
    LEAST_STD_SHARE,
    Calibration,
    ChannelMoments,
    NotStorable,
    codec_bound,
    decode_int8,
    decode_int8_numpy,
    encode,
    encode_int8,
    measure_codec,
    rounding_bound,
)
from distill.teacher import TeacherTargets

# int8 with per-token scale on heavy tails: amax of 1024 Student-t5 draws is about 10 deviations, the rounding error
# uniform in a step of 10/127, so 1 - cos ~ (10/127)^2 / 12 / 2 = 2.6e-4.
COSINE_P1_ON_HEAVY_TAILS = 0.9995
LOG_GRAM_ERROR = 0.015


def heavy_tailed(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Student-t5 tokens with channel means, deviations over two decades and a few outlier channels."""
    generator = np.random.default_rng(seed)
    tokens = generator.standard_t(5, shape)
    std = 10 ** generator.uniform(-1, 1, shape[-1])
    std[:3] *= 15
    return torch.tensor(tokens * std + generator.standard_normal(shape[-1]) * 3, dtype=torch.float32)


def calibrated(tokens: Tensor) -> Calibration:
    moments = ChannelMoments()
    moments.add(tokens)
    return moments.calibration()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("magnitude", [1e-9, 1e-6, 1e-3, 1.0, 1e3])
def test_int8_error_never_exceeds_the_stated_bound(dtype: torch.dtype, magnitude: float) -> None:
    if dtype == torch.float16 and magnitude > 100:
        magnitude = 100  # what is handed out in fp16 must fit it
    tokens = heavy_tailed((4, 2, 9, 64)) * magnitude
    mean, std = calibrated(tokens[:2]).tensors()  # half of the data is not in the calibration
    codes, scale = encode_int8(tokens, mean, std)
    decoded = decode_int8(codes, scale, mean, std, dtype=dtype)
    bound = codec_bound(scale, mean, std) + rounding_bound(decode_int8(codes, scale, mean, std), dtype)
    error = (decoded.double() - tokens.double()).abs()
    assert bool((error <= bound).all())
    assert float((error / bound).max()) > 0.5  # the bound is not idle


@settings(deadline=None)
@given(
    st.lists(st.floats(-3e4, 3e4, width=32), min_size=4, max_size=4),
    st.lists(st.floats(2.0**-10, 2.0**10, width=32), min_size=4, max_size=4),
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=4),
)
def test_int8_bound_holds_for_any_token_and_calibration(
    token: list[float], std: list[float], mean: list[float]
) -> None:
    x, s, m = torch.tensor([token]), torch.tensor(std), torch.tensor(mean)
    codes, scale = encode_int8(x, m, s)
    if not bool(torch.isfinite(scale).all()):
        assert float(((x - m) / s).abs().max()) > 65504 * 127 * (1 - 2**-10)
        return
    error = (decode_int8(codes, scale, m, s).double() - x.double()).abs()
    assert bool((error <= codec_bound(scale, m, s)).all())


def test_scale_is_the_smallest_fp16_that_clips_nothing() -> None:
    tokens = heavy_tailed((64, 32))
    mean, std = torch.zeros(32), torch.ones(32)
    codes, scale = encode_int8(tokens, mean, std)
    amax = tokens.abs().amax(-1)
    smaller = (scale.view(torch.int16) - 1).view(torch.float16)
    assert bool((scale.float() * 127 >= amax).all())
    assert bool((smaller.float() * 127 < amax).all())
    assert int(codes.abs().max()) == 127 and int(codes.min()) >= -127


def test_token_at_the_mean_is_exact() -> None:
    mean, std = torch.linspace(-5, 5, 8), torch.full((8,), 0.3)
    codes, scale = encode_int8(mean.expand(3, 8), mean, std)
    assert torch.equal(scale, torch.zeros(3, dtype=torch.float16))
    assert torch.equal(decode_int8(codes, scale, mean, std), mean.expand(3, 8))


def test_numpy_and_torch_decode_the_same_bits() -> None:
    tokens = heavy_tailed((3, 2, 5, 32))
    calibration = calibrated(tokens)
    codes, scale = encode_int8(tokens, *calibration.tensors())
    expected = decode_int8(codes, scale, *calibration.tensors()).numpy()
    assert np.array_equal(decode_int8_numpy(codes.numpy(), scale.numpy(), calibration), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_bound_holds_down_to_subnormals(dtype: torch.dtype) -> None:
    values = heavy_tailed((50, 64)).double() * torch.logspace(-9, 2, 50, dtype=torch.float64)[:, None]
    rounded = values.to(dtype)
    assert bool(((rounded.double() - values).abs() <= rounding_bound(rounded, dtype)).all())


@pytest.mark.parametrize("codec", ["int8", "fp16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
@pytest.mark.parametrize("where", ["cls", "patches"])
def test_token_that_cannot_be_stored_names_its_row(codec: str, bad: float, where: str) -> None:
    tokens = heavy_tailed((5, 2, 4, 16))
    targets = TeacherTargets(cls=tokens[:, :, 0].clone(), patches=tokens.clone())
    getattr(targets, where)[3, 1].view(-1)[7] = bad
    calibration = (torch.zeros(16), torch.ones(16))
    with pytest.raises(NotStorable, match=f"{'cls token' if where == 'cls' else 'patch tokens'}.*row 3") as caught:
        encode(targets, codec=codec, calibration=calibration)  # type: ignore[arg-type]
    assert caught.value.row == 3


def test_calibration_equals_the_moments_of_all_tokens_at_once() -> None:
    tokens = heavy_tailed((30, 2, 5, 16)) + 1e3  # a mean far from 0 breaks naive sums of squares
    moments = ChannelMoments()
    for part in tokens.split([7, 1, 22]):
        moments.add(part)
    calibration = moments.calibration()
    flat = tokens.double().flatten(0, -2).numpy()
    np.testing.assert_allclose(calibration.mean, flat.mean(0), rtol=1e-6)
    np.testing.assert_allclose(calibration.std, flat.std(0), rtol=1e-6)


def test_constant_channel_gets_a_positive_deviation() -> None:
    tokens = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    tokens[:, 2] = 5.0
    calibration = calibrated(tokens)
    typical = float(np.sqrt(np.mean(tokens.double().numpy().std(0) ** 2)))
    assert calibration.std[2] == pytest.approx(LEAST_STD_SHARE * typical, rel=1e-6)


def test_calibration_of_nan_tokens_is_refused() -> None:
    moments = ChannelMoments()
    moments.add(torch.full((3, 4), float("nan")))
    with pytest.raises(ValueError, match="4 of 4 channels"):
        moments.calibration()


def test_int8_keeps_heavy_tailed_tokens_close_enough_for_the_losses() -> None:
    tokens = heavy_tailed((4, 49, 256), seed=3)
    quality = measure_codec(tokens, "int8", calibrated(tokens))
    assert quality.standardised_cosine_p1 >= COSINE_P1_ON_HEAVY_TAILS
    assert quality.log_gram <= LOG_GRAM_ERROR
    exact = measure_codec(tokens, "fp16", None)
    assert exact.log_gram < quality.log_gram / 10  # fp16 keeps 11 bits, int8 about 7
