"""From patch tokens to symmetric positive definite matrices whose spectrum is known in advance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

MAX_TOKENS = 256
"""The largest matrix that the fused kernels take; above it, `reduce_tokens` first."""


def _unit_tokens(tokens: Tensor) -> Tensor:
    """Tokens of length 1 in fp32 (fp64 stays), at any finite scale; a zero token stays zero.

    The scale is divided out first, so that no finite bf16 value overflows in the sum of squares. It is a
    constant to autograd: the result does not depend on it, so neither does the gradient.
    """
    tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
    scale = tokens.detach().abs().amax(dim=-1, keepdim=True)
    tokens = tokens / torch.where(scale == 0, 1.0, scale)
    # The largest entry is now 1, so the sum is at least 1: the clamp acts on a zero token alone.
    return tokens * tokens.square().sum(dim=-1, keepdim=True).clamp_min(0.5).rsqrt()


def _check_tokens(tokens: Tensor) -> None:
    if tokens.dim() != 3 or 0 in tokens.shape or not tokens.is_floating_point():
        raise ValueError(
            f"tokens: floating point [batch, tokens, channels] is needed, got {tokens.dtype} "
            f"{list(tokens.shape)}. Pass the patch tokens of one crop a row, without cls and register tokens."
        )


def check_eps(eps: float) -> None:
    """Raise ValueError for an eps that is no lower end of a spectrum."""
    if not 0 < eps < math.inf:  # comparisons, which the compiler traces where eps changes between calls
        raise ValueError(
            f"eps: the lower end of the spectrum must be a positive finite number, got {eps}. "
            "Use the default 1.0 or a sweep such as 1, 0.3, 0.1."
        )


def _plus_eps(gram: Tensor, eps: float) -> Tensor:
    return gram + eps * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def token_spd(tokens: Float[Tensor, "b n d"], *, eps: float = 1.0) -> Float[Tensor, "b n n"]:
    """Gram matrix of the unit-length tokens plus `eps` on the diagonal; spectrum inside [eps, n + eps].

    tokens: [b, n, d], any float dtype; the result is fp32, or fp64 for fp64 tokens, also under autocast.
    The tokens are not centred. A row with a NaN or Inf gives a matrix with NaN in it, never an exception.
    Raises ValueError for another rank, an empty tensor, integers, or `eps` that is not positive.
    """
    _check_tokens(tokens)
    check_eps(eps)
    with torch.autocast(tokens.device.type, enabled=False):
        unit = _unit_tokens(tokens)
        return _plus_eps(unit @ unit.mT, eps)


def channel_spd(tokens: Float[Tensor, "b n d"], *, eps: float = 1.0) -> Float[Tensor, "b d d"]:
    """Channel second moments of the unit-length tokens, trace d, plus `eps`; spectrum inside [eps, d + eps].

    Student and teacher must have the same number of channels, so project both first (at most 256 for the
    fused kernels). Dtypes and errors as in `token_spd`.
    """
    _check_tokens(tokens)
    check_eps(eps)
    with torch.autocast(tokens.device.type, enabled=False):
        unit = _unit_tokens(tokens)
        num_tokens, num_channels = unit.shape[-2:]
        return _plus_eps(unit.mT @ unit * (num_channels / num_tokens), eps)


@dataclass(frozen=True)
class TokenReduction:
    """How a grid of tokens becomes few enough: windows of factor x factor, pooled or sampled."""

    grid: tuple[int, int]
    factor: int
    method: Literal["pool", "sample"]

    @property
    def num_tokens(self) -> int:
        """Tokens that are left."""
        height, width = self.grid
        return math.ceil(height / self.factor) * math.ceil(width / self.factor)

    def __str__(self) -> str:
        height, width = self.grid
        if self.factor == 1:
            return f"SPD loss on all {height * width} tokens"
        verb = "averages" if self.method == "pool" else "takes one of"
        return (
            f"SPD loss {verb} each {self.factor} x {self.factor} window: {self.num_tokens} of {height * width} tokens"
        )


def plan_reduction(
    grid: tuple[int, int], *, method: Literal["pool", "sample"] = "pool", limit: int = MAX_TOKENS
) -> TokenReduction:
    """The smallest window that leaves at most `limit` tokens of a (height, width) grid; `str` says it."""
    if min(grid) < 1 or limit < 1:
        raise ValueError(
            f"grid, limit: positive sizes are needed, got {grid}, {limit}. Pass the token grid (height, width)."
        )
    if method not in ("pool", "sample"):
        raise ValueError(f"method: 'pool' or 'sample' is needed, got {method!r}. Choose one of the two.")
    factor = 1
    while math.ceil(grid[0] / factor) * math.ceil(grid[1] / factor) > limit:
        factor += 1
    return TokenReduction(grid, factor, method)


def reduce_tokens(
    tokens: Float[Tensor, "b n d"],
    grid: tuple[int, int],
    method: Literal["pool", "sample"] = "pool",
    limit: int = MAX_TOKENS,
) -> Float[Tensor, "b m d"]:
    """At most `limit` tokens of a row-major `grid`, by averaging windows or taking the token at their middle.

    A pure function of the shape, so student and teacher keep the same places. tokens: [b, n, d] with
    n = height * width; dtype kept; unchanged if n <= limit. Raises ValueError where the grid does not fit.
    """
    _check_tokens(tokens)
    plan = plan_reduction(grid, method=method, limit=limit)
    height, width = grid
    if height * width != tokens.shape[1]:
        raise ValueError(
            f"grid: {height} x {width} = {height * width} places, but there are {tokens.shape[1]} tokens. "
            "Pass the grid of patch tokens, without cls and register tokens."
        )
    if plan.factor == 1:
        return tokens
    batch, _, channels = tokens.shape
    image = tokens.reshape(batch, height, width, channels)
    if method == "sample":
        rows = _window_middles(height, plan.factor, tokens.device)
        columns = _window_middles(width, plan.factor, tokens.device)
        return image.index_select(1, rows).index_select(2, columns).reshape(batch, plan.num_tokens, channels)
    # A window cut by the edge averages the tokens it has.
    pooled = torch.nn.functional.avg_pool2d(
        image.permute(0, 3, 1, 2), plan.factor, ceil_mode=True, count_include_pad=False
    )
    return pooled.flatten(2).mT


def _window_middles(length: int, factor: int, device: torch.device) -> Tensor:
    """Made on the device: a list as an index would be copied there in every step, and the host would wait."""
    start = torch.arange(0, length, factor, device=device)
    return (start + (start + factor).clamp_max(length) - 1) // 2
