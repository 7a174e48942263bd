"""The Gram matrices: values, scale, dtypes, bad tokens, and the reduction of many tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.spd import channel_spd, plan_reduction, reduce_tokens, token_spd
from kernels.spd.reference import reference_token_spd

SINGLE_TOLERANCE = 16 * 2.0**-24
"""An entry is a sum of d products of unit vectors' entries: its error is a few u, whatever d."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_token_spd_equals_cosines_plus_eps(spd_tokens, dtype):
    tokens = spd_tokens("random", 12).to(dtype)
    matrices = token_spd(tokens, eps=0.3)
    assert matrices.dtype == torch.float32
    assert float((matrices - reference_token_spd(tokens, 0.3)).abs().max()) <= SINGLE_TOLERANCE


def test_float64_tokens_stay_float64(spd_tokens):
    tokens = spd_tokens("random", 12)
    matrices = token_spd(tokens)
    assert matrices.dtype == torch.float64
    assert float((matrices - reference_token_spd(tokens)).abs().max()) <= 16 * 2.0**-53


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 24),
    channels=st.integers(1, 24),
    eps=st.sampled_from([1.0, 0.3, 0.1, 0.01]),
    power=st.integers(-120, 120),
)
def test_spectrum_lies_between_eps_and_n_plus_eps_at_any_scale(seed, n, channels, eps, power):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, n, channels, generator=generator) * 2.0**power
    values = torch.linalg.eigvalsh(token_spd(tokens, eps=eps).double())
    slack = n * SINGLE_TOLERANCE
    assert float(values.min()) >= eps - slack
    assert float(values.max()) <= n + eps + slack


def test_largest_bfloat16_tokens_do_not_overflow():
    tokens = torch.full((1, 4, 64), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    assert torch.allclose(token_spd(tokens), torch.ones(4, 4) + torch.eye(4), atol=SINGLE_TOLERANCE)


def test_zero_token_gives_a_zero_row_and_a_finite_gradient():
    tokens = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    tokens[0, 2] = 0
    tokens.requires_grad_()
    matrices = token_spd(tokens)
    expected = torch.zeros(5)
    expected[2] = 1.0
    assert torch.equal(matrices[0, 2], expected)
    matrices.square().sum().backward()
    assert bool(torch.isfinite(tokens.grad).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_token_spoils_its_own_matrix_only(bad):
    tokens = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    clean = token_spd(tokens)
    tokens[1, 4, 3] = bad
    matrices = token_spd(tokens)
    assert bool(torch.isnan(matrices[1, 4]).all())
    assert torch.equal(matrices[[0, 2]], clean[[0, 2]])


def test_token_spd_is_fp32_under_autocast(spd_tokens):
    tokens = spd_tokens("random", 12).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = token_spd(tokens)
    assert torch.equal(inside, token_spd(tokens))


def test_channel_spd_has_trace_d_plus_d_eps(spd_tokens):
    tokens = spd_tokens("random", 12)
    matrices = channel_spd(tokens, eps=0.5)
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    expected = torch.einsum("bnc,bnd->bcd", unit, unit) * 48 / 12 + 0.5 * torch.eye(48)
    assert torch.allclose(matrices, expected, atol=1e-12)
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    assert torch.allclose(trace, torch.full((2,), 48 * 1.5, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(4, 8), (0, 4, 8), (2, 0, 8), (2, 4, 8, 1)])
def test_tokens_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"tokens: floating point \[batch, tokens, channels\] is needed"):
        token_spd(torch.zeros(shape))


def test_integer_tokens_are_refused():
    with pytest.raises(ValueError, match=r"got torch\.int64 \[2, 4, 8\]"):
        channel_spd(torch.zeros(2, 4, 8, dtype=torch.int64))


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan"), float("inf")])
def test_eps_that_is_not_positive_is_refused(eps):
    with pytest.raises(ValueError, match=r"eps: the lower end of the spectrum must be a positive finite"):
        token_spd(torch.zeros(2, 4, 8), eps=eps)


def test_pooled_tokens_are_window_means():
    tokens = torch.arange(5 * 6, dtype=torch.float32).reshape(1, 30, 1)
    reduced = reduce_tokens(tokens, (5, 6), "pool", limit=9)
    image = tokens.reshape(5, 6)
    rows = [slice(0, 2), slice(2, 4), slice(4, 5)]
    columns = [slice(0, 2), slice(2, 4), slice(4, 6)]
    expected = torch.stack([image[row, column].mean() for row in rows for column in columns])
    assert torch.equal(reduced[0, :, 0], expected)


def test_sampled_tokens_are_tokens_at_window_middles():
    tokens = torch.arange(7 * 7, dtype=torch.float32).reshape(1, 49, 1)
    reduced = reduce_tokens(tokens, (7, 7), "sample", limit=9)
    assert reduced[0, :, 0].tolist() == [7 * row + column for row in (1, 4, 6) for column in (1, 4, 6)]


def test_few_tokens_are_left_alone():
    tokens = torch.randn(2, 196, 8)
    assert reduce_tokens(tokens, (14, 14)) is tokens
    assert str(plan_reduction((14, 14))) == "SPD loss on all 196 tokens"


def test_reduction_says_what_it_does():
    plan = plan_reduction((28, 28))
    assert plan.num_tokens == 196
    assert str(plan) == "SPD loss averages each 2 x 2 window: 196 of 784 tokens"
    assert "takes one of each 2 x 2 window" in str(plan_reduction((28, 28), method="sample"))


@settings(deadline=None, max_examples=60)
@given(height=st.integers(1, 60), width=st.integers(1, 60), limit=st.integers(1, 256))
def test_reduction_keeps_to_the_limit_with_the_smallest_window(height, width, limit):
    plan = plan_reduction((height, width), limit=limit)
    assert plan.num_tokens <= limit
    smaller = plan.factor - 1
    assert smaller == 0 or -(-height // smaller) * -(-width // smaller) > limit
    tokens = torch.zeros(1, height * width, 1)
    for method in ("pool", "sample"):
        assert reduce_tokens(tokens, (height, width), method, limit).shape[1] == plan.num_tokens


def test_reduction_refuses_a_grid_that_does_not_fit():
    with pytest.raises(ValueError, match=r"14 x 14 = 196 places, but there are 201 tokens"):
        reduce_tokens(torch.zeros(1, 201, 4), (14, 14))
    with pytest.raises(ValueError, match=r"method: 'pool' or 'sample' is needed, got 'mean'"):
        reduce_tokens(torch.zeros(1, 196, 4), (14, 14), "mean")
    with pytest.raises(ValueError, match=r"grid, limit: positive sizes are needed"):
        plan_reduction((0, 14))


class DevicesOfArguments(TorchDispatchMode):
    """Remembers where the tensors are that operations are given."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs or {}))
        self.seen |= {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["pool", "sample"])
def test_nothing_is_copied_from_the_host_to_make_the_matrices(method):
    """Such a copy makes the host wait and cannot be captured in a CUDA graph."""
    with FakeTensorMode(), DevicesOfArguments() as devices:
        token_spd(reduce_tokens(torch.empty(2, 784, 8, device="cuda"), (28, 28), method))
    assert devices.seen == {"cuda"}
