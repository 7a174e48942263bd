"""Launches of the Triton kernels: where they run, their scratch, their tile sizes. Triton is imported at the first."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from kernels.spd.poles import RationalLog

RESOLVENT_TILE = 32
RESOLVENT_OPTIONS = {"num_warps": 4, "num_stages": 1}
RESOLVENT_LIMIT = 256
"""Largest n of the resolvent kernel; its scratch is b x poles x n^2 fp32."""
COMBINE_OPTIONS = {"num_warps": 4, "num_stages": 2}
JACOBI_LIMIT = 64
JACOBI_SWEEPS = 15
JACOBI_CONVERGED = 2.0**-44
"""Squared share of the off-diagonal part at which sweeps end: (2^-22)^2, the rounding of fp32."""
JACOBI_USABLE = 2.0**-32
"""A matrix above this share after the last sweep gives NaN, not a wrong number."""
SPECTRAL_TILE = 64
SPECTRAL_DEPTH = 32
SPECTRAL_OPTIONS = {"num_warps": 8, "num_stages": 3}
OPERAND_DTYPE = torch.float16
"""Of the operands of the gradient products: below 1 at eps = 1, below 600 at any eps; digits matter, not range."""
MIN_CAPABILITY = (8, 0)
"""TF32 tensor cores."""


def jacobi_options(size: int) -> dict[str, int]:
    """Warps that hold a size x size matrix in registers, and a pipeline depth, that spill nothing."""
    return {"num_warps": 4, "num_stages": 2} if size <= 32 else {"num_warps": 8, "num_stages": 1}


def interpreted() -> bool:
    """True where Triton was asked to interpret its kernels on the CPU (tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _device_fits(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return interpreted()
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def resolvent_fits(matrices: Tensor) -> bool:
    """Whether the resolvent kernel takes [b, n, n] matrices of this device, dtype and size."""
    small = matrices.shape[-1] <= RESOLVENT_LIMIT
    return small and matrices.dtype == torch.float32 and _device_fits(matrices.device)


def jacobi_fits(matrices: Tensor) -> bool:
    """Whether the one-launch eigendecomposition takes [b, n, n] matrices of this device, dtype and size."""
    small = matrices.shape[-1] <= JACOBI_LIMIT
    return small and matrices.dtype == torch.float32 and _device_fits(matrices.device)


def spectral_fits(matrices: Tensor) -> bool:
    """Whether the kernels around the eigensolver take matrices of this device and dtype."""
    return matrices.dtype == torch.float32 and _device_fits(matrices.device)


def round_up(n: int, multiple: int) -> int:
    """The next multiple."""
    return -(-n // multiple) * multiple


def _num_tile_pairs(n: int, tile: int) -> int:
    tiles = round_up(n, tile) // tile
    return tiles * (tiles + 1) // 2


def _inverses(matrices: Tensor, rational: RationalLog) -> Tensor:
    """Lower tiles of the negative shifted inverses, [b, poles, size, size]."""
    from kernels.spd.triton_resolvent import resolvent_kernel

    batch, n, _ = matrices.shape
    num_poles = len(rational.poles)
    size = round_up(n, RESOLVENT_TILE)
    work = matrices.new_empty(batch, num_poles, size, size)
    panels = matrices.new_empty(batch, num_poles, size, RESOLVENT_TILE)
    resolvent_kernel[(batch * num_poles,)](
        matrices.contiguous(),
        work,
        panels,
        rational.poles,
        n,
        size // RESOLVENT_TILE,
        NUM_POLES=num_poles,
        TILE=RESOLVENT_TILE,
        **RESOLVENT_OPTIONS,
    )
    return work


def _combine(
    work: Tensor,
    rational: RationalLog,
    n: int,
    *,
    target: Tensor | None = None,
    log: Tensor | None = None,
    partials: Tensor | None = None,
    upstream: Tensor | None = None,
    operands: Tensor | None = None,
) -> None:
    from kernels.spd.triton_combine import combine_kernel

    batch, num_poles, size, _ = work.shape
    # A pointer that a variant of the kernel does not use is any pointer.
    combine_kernel[(_num_tile_pairs(n, RESOLVENT_TILE), batch)](
        work,
        work if target is None else target,
        work if log is None else log,
        work if partials is None else partials,
        work if upstream is None else upstream,
        work if operands is None else operands,
        rational.residues,
        rational.constant,
        n,
        size // RESOLVENT_TILE,
        round_up(n, 16),
        NUM_POLES=num_poles,
        TILE=RESOLVENT_TILE,
        HAS_TARGET=target is not None,
        WRITE_LOG=log is not None,
        WRITE_OPERANDS=operands is not None,
        **COMBINE_OPTIONS,
    )


def resolvent_logm(matrices: Tensor, rational: RationalLog) -> Tensor:
    """f(A), [b, n, n]."""
    log = torch.empty_like(matrices, memory_format=torch.contiguous_format)
    _combine(_inverses(matrices, rational), rational, matrices.shape[-1], log=log)
    return log


def resolvent_loss(matrices: Tensor, target: Tensor, rational: RationalLog, with_grad: bool) -> tuple[Tensor, Tensor]:
    """||f(A) - T||^2, [b], and its gradient in A, [b, n, n] (or [0] if not wanted)."""
    batch, n, _ = matrices.shape
    work = _inverses(matrices, rational)
    partials = matrices.new_empty(batch, _num_tile_pairs(n, RESOLVENT_TILE))
    target = target.contiguous()
    if not with_grad:
        _combine(work, rational, n, target=target, partials=partials)
        return partials.sum(dim=1), matrices.new_empty(0)
    padded = round_up(n, 16)
    upstream = matrices.new_empty(batch, padded, padded, dtype=OPERAND_DTYPE)
    operands = matrices.new_empty(batch, n, len(rational.poles), padded, dtype=OPERAND_DTYPE)
    _combine(work, rational, n, target=target, partials=partials, upstream=upstream, operands=operands)
    return partials.sum(dim=1), _pullback(operands, upstream)


def resolvent_logm_backward(matrices: Tensor, upstream: Tensor, rational: RationalLog) -> Tensor:
    """sum_j rho_j R_j G R_j for symmetric G, all [b, n, n]."""
    batch, n, _ = matrices.shape
    padded = round_up(n, 16)
    operands = matrices.new_empty(batch, n, len(rational.poles), padded, dtype=OPERAND_DTYPE)
    _combine(_inverses(matrices, rational), rational, n, operands=operands)
    # A gradient from outside has any scale: bring it to that of the operands, exactly, by a power of two.
    peak = upstream.abs().amax(dim=(-2, -1), keepdim=True)
    scale = torch.exp2(torch.floor(torch.log2(torch.where(peak > 0, peak, 1.0))))
    padding = (0, padded - n, 0, padded - n)
    scaled = torch.nn.functional.pad(upstream / scale, padding).to(OPERAND_DTYPE)
    return _pullback(operands, scaled) * scale


def _pullback(operands: Tensor, upstream: Tensor) -> Tensor:
    """sum_j R'_j G R'_j: operands [b, n, poles, padded], the R'_j side by side; see resolvent._pullback."""
    batch, n, num_poles, padded = operands.shape
    products = torch.bmm(operands.view(batch, n * num_poles, padded), upstream)
    products = products.view(batch, n, num_poles * padded)
    side_by_side = operands.view(batch, n, num_poles * padded)
    if operands.device.type == "cuda":
        return torch.bmm(products, side_by_side.mT, out_dtype=torch.float32)
    return torch.bmm(products.float(), side_by_side.mT.float())


def jacobi(matrices: Tensor, given: Tensor | None, mode: str) -> tuple[Tensor, Tensor]:
    """One launch of the eigendecomposition for n <= 64 with what follows it; (loss [b], out [b, n, n]).

    mode "log": out = log A. "loss" and "loss_and_gradient": against `given`. "pullback": out = the gradient of
    <given, log A>. What a mode does not give is empty.
    """
    from kernels.spd.triton_jacobi import jacobi_kernel

    batch, n, _ = matrices.shape
    matrices = matrices.contiguous()
    size = max(16, 1 << (n - 1).bit_length())
    loss = matrices.new_empty(batch if mode.startswith("loss") else 0)
    out = matrices.new_empty(0 if mode == "loss" else matrices.shape)
    jacobi_kernel[(batch,)](
        matrices,
        matrices if given is None else given.contiguous(),
        loss,
        out,
        matrices.new_empty(batch, 3, size, size),
        n,
        SIZE=size,
        MAX_SWEEPS=JACOBI_SWEEPS,
        CONVERGED=JACOBI_CONVERGED,
        USABLE=JACOBI_USABLE,
        HAS_TARGET=mode.startswith("loss"),
        WITH_GRADIENT=mode == "loss_and_gradient",
        PULLBACK=mode == "pullback",
        **jacobi_options(size),
    )
    return loss, out


def log_map(eigenvalues: Tensor, vectors: Tensor, target: Tensor | None, write: bool) -> tuple[Tensor, Tensor]:
    """(distance [b], log A) from eigenvalues [b, n] and vectors [b, n, n]; with a target 2 (log A - T) instead."""
    from kernels.spd.triton_spectral import log_map_kernel

    batch, n = eigenvalues.shape
    pairs = _num_tile_pairs(n, SPECTRAL_TILE)
    vectors = vectors.contiguous()
    partials = eigenvalues.new_empty(batch, pairs if target is not None else 0)
    out = vectors.new_empty(vectors.shape if write else 0)
    log_map_kernel[(pairs, batch)](
        vectors,
        eigenvalues.contiguous(),
        vectors if target is None else target.contiguous(),
        out,
        partials,
        n,
        TILE=SPECTRAL_TILE,
        DEPTH=SPECTRAL_DEPTH,
        HAS_TARGET=target is not None,
        WRITE=write,
        **SPECTRAL_OPTIONS,
    )
    return partials.sum(dim=1), out


def spectral_gradient(eigenvalues: Tensor, vectors: Tensor, upstream: Tensor) -> Tensor:
    """U (Phi o (U^T G U)) U^T for symmetric G."""
    from kernels.spd.triton_spectral import loewner_kernel

    batch, n = eigenvalues.shape
    vectors = vectors.contiguous()
    inner = torch.empty_like(vectors)
    loewner_kernel[(_num_tile_pairs(n, SPECTRAL_TILE), batch)](
        vectors,
        upstream @ vectors,
        eigenvalues.contiguous(),
        inner,
        n,
        TILE=SPECTRAL_TILE,
        DEPTH=SPECTRAL_DEPTH,
        **SPECTRAL_OPTIONS,
    )
    return vectors @ inner @ vectors.mT
