"""The log-Euclidean loss, forward and backward, by each path, against eigh with the Loewner gradient.

Each path computes the loss of the same tokens [B, n, 384] against the same teacher logarithms, and its gradient
in the tokens. Rounds go through all paths in random order and a ratio is taken within a round; figures are
medians. The floor is the time of the least traffic and arithmetic at the copy bandwidth and matrix product rates
measured in the same run. On CUDA times are between events, and the paths that a graph can hold are measured from a
graph too ("_graph"): the difference is the launches. A shape whose paths are slow gets fewer rounds.

    python -m benchmarks.bench_spd [--quick] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks import cusolver
from benchmarks.results import append_rows, commit, processor
from benchmarks.synthetic import synthetic_tokens
from kernels.spd import log_euclidean_loss, spd_logm, token_spd
from kernels.spd.device import full_fp32, fused
from kernels.spd.eigh import JACOBI_LIMIT, batched_eigh, plain_eigh_loss
from kernels.spd.poles import rational_log
from kernels.spd.resolvent import cholesky_loss

RESULTS = Path(__file__).parent / "results" / "spd.csv"
CHANNELS = 384
EPS = 1.0
BASELINE = "eigh_loewner"
ROUNDS = {"cuda": 30, "cpu": 7}
LEAST_ROUNDS = 5
SECONDS_OF_ROUNDS = {"cuda": 15.0, "cpu": math.inf}
"""For one shape. Twelve shapes with their warm-up and the compilation are then over in 5 minutes on a GPU."""
Path_ = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        path: who computes the loss; "solver_only" is the batched eigendecomposition and nothing else.
        milliseconds: median of the whole loss, forward and backward.
        spread: interquartile range over the median.
        speedup: median over rounds of the baseline's time over this path's in the same round.
        floor_ms: least traffic and arithmetic of the resolvent at the measured rates.
        solver: whose eigendecomposition "eigh_loewner", "eigh_fused" above n = 64, and "solver_only" are.
    """

    path: str
    device: str
    hardware: str
    batch: int
    n: int
    dtype: str
    eps: float
    milliseconds: float
    spread: float
    speedup: float
    rounds: int
    floor_ms: float
    copy_gb_s: float
    matmul_tflop_s: float
    threads: int
    torch: str
    commit: str
    date: str
    tf32_tflop_s: float | None
    fp16_tflop_s: float | None
    solver: str


@dataclass(frozen=True)
class Rates:
    """What the device was measured to do: bytes a second of a copy, operations a second of matrix products."""

    copy: float
    fp32: float
    tf32: float | None
    fp16: float | None


LOOP_FREE_UP_TO = 32
"""torch 2.11 and older solve larger CUDA matrices one by one (github.com/pytorch/pytorch/issues/174674)."""


def solver_for(matrices: Tensor) -> str:
    """Who solves [b, n, n] matrices: "torch", "cusolver" (called directly), or "torch, one by one"."""
    old = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) <= (2, 11)
    if not (old and matrices.device.type == "cuda" and matrices.shape[-1] > LOOP_FREE_UP_TO):
        return "torch"
    return "torch, one by one" if cusolver.load_library() is None else "cusolver"


def solve(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors by a batched solver wherever there is one: a loop would be no baseline."""
    return cusolver.batched_eigh(matrices) if solver_for(matrices) == "cusolver" else batched_eigh(matrices)


class _PlainLoss(torch.autograd.Function):
    """A loss [b] whose gradient in the matrices came with it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, matrices: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return grad[:, None, None] * gradient, None, None


def _whole(tokens: Tensor, loss_of: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    matrices = token_spd(tokens, eps=EPS)
    with torch.no_grad(), full_fp32(tokens.device):
        distance, gradient = loss_of(matrices)
    return (_PlainLoss.apply(matrices, distance, gradient) / matrices.shape[-1]).mean()


def autograd_eigh(tokens: Tensor, target: Tensor) -> Tensor:
    """The textbook: autograd through torch.linalg.eigh (NaN at repeated eigenvalues)."""
    eigenvalues, vectors = torch.linalg.eigh(token_spd(tokens, eps=EPS))
    log = (vectors * eigenvalues.log()[:, None, :]) @ vectors.mT
    return (log - target).square().sum(dim=(-2, -1)).mean() / target.shape[-1]


def eigh_loewner(tokens: Tensor, target: Tensor) -> Tensor:
    """The batched solver and torch's own products."""
    return _whole(tokens, lambda matrices: plain_eigh_loss(*solve(matrices), target, True))


def resolvent_cholesky(tokens: Tensor, target: Tensor) -> Tensor:
    """Shifted inverses by batched Cholesky factors."""
    rational = rational_log(EPS, tokens.shape[1])
    return _whole(tokens, lambda matrices: cholesky_loss(matrices, target, rational, True))


def public(backend: Literal["eigh", "resolvent"]) -> Path_:
    """The public function; on CUDA these are the fused kernels."""
    return lambda tokens, target: log_euclidean_loss(tokens, target, eps=EPS, backend=backend)


def solver_only(tokens: Tensor, target: Tensor) -> Tensor:
    """The batched eigendecomposition alone, as a bound on every path that diagonalises."""
    with torch.no_grad():
        solve(token_spd(tokens, eps=EPS))
    return torch.zeros((), device=tokens.device)


def paths_for(device: torch.device) -> dict[str, Path_]:
    """The paths that exist on this device."""
    paths: dict[str, Path_] = {
        "autograd_eigh": autograd_eigh,
        BASELINE: eigh_loewner,
        "resolvent_cholesky": resolvent_cholesky,
        "solver_only": solver_only,
    }
    if fused(torch.empty(1, 1, 1, device=device)):
        paths["eigh_fused"] = public("eigh")
        paths["resolvent"] = public("resolvent")
    return paths


def replayed(path: Path_, tokens: Tensor, target: Tensor) -> Path_:
    """The path, forward and backward, captured in a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = path(tokens, target)
        torch.autograd.grad(loss, tokens)

    def replay(tokens: Tensor, target: Tensor) -> Tensor:
        graph.replay()
        return loss.detach()

    return replay


def timed_ms(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, the device idle before and after."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def timed(path: Path_, tokens: Tensor, target: Tensor) -> float:
    """Milliseconds of forward and backward."""
    tokens.grad = None

    def step() -> None:
        loss = path(tokens, target)
        if loss.requires_grad:
            loss.backward()

    return timed_ms(step, tokens.device)


@functools.cache
def measured_rates(device: torch.device) -> Rates:
    """A copy's bytes (read and write), and products in fp32; on CUDA also those that the kernels are made of."""

    def best(work: Callable[[], object]) -> float:
        return min(timed_ms(work, device) for _ in range(8)) / 1e3

    on_gpu = device.type == "cuda"
    size = 2**30 if on_gpu else 2**27
    source = torch.empty(size // 4, device=device)
    destination = torch.empty_like(source)
    side = 8192 if on_gpu else 1024
    square = torch.randn(side, side, device=device)
    with full_fp32(device):
        fp32 = 2 * side**3 / best(lambda: square @ square)
        tf32 = fp16 = None
        if on_gpu:
            torch.backends.cuda.matmul.fp32_precision = "tf32"  # full_fp32 puts back what was there
            tf32 = 2 * side**3 / best(lambda: square @ square)
            half = square.half()
            fp16 = 2 * side**3 / best(lambda: half @ half)
    return Rates(2 * size / best(lambda: destination.copy_(source)), fp32, tf32, fp16)


def floor_ms(rates: Rates, batch: int, n: int) -> float:
    """Read A and T, write dA; n^3 (inverse) + 4 n^3 (gradient) operations a pole, the Gram and its gradient.

    On CUDA an inverse of fp32 accuracy is three products in TF32 and the gradient's are in fp16.
    """
    cubes = batch * len(rational_log(EPS, n).poles) * n**3
    inverses = cubes / rates.fp32 if rates.tf32 is None else 3 * cubes / rates.tf32
    gradient = 4 * cubes / (rates.fp16 or rates.fp32)
    gram = batch * 6 * n**2 * CHANNELS / rates.fp32
    traffic = batch * (3 * n**2 + 3 * n * CHANNELS) * 4 / rates.copy
    return max(inverses + gradient + gram, traffic) * 1e3


def inputs(device: torch.device, batch: int, n: int) -> tuple[Tensor, Tensor]:
    """Student tokens [B, n, 384] that ask for a gradient, and the teacher's logarithms."""
    tokens = synthetic_tokens("typical", 4, n, CHANNELS, seed=1).float().repeat(-(-batch // 4), 1, 1)[:batch]
    tokens = (tokens + 1e-3 * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2))).to(device)
    teacher = synthetic_tokens("typical", 4, n, 1024, seed=3).float().repeat(-(-batch // 4), 1, 1)[:batch]
    with torch.no_grad():
        return tokens.requires_grad_(), spd_logm(token_spd(teacher.to(device), eps=EPS), eps=EPS)


def warmed_up(device: torch.device, tokens: Tensor, target: Tensor) -> dict[str, Path_]:
    """All paths of this shape, compiled, their caches and pools filled; on CUDA with the graphs of two."""
    paths = paths_for(device)
    for path in paths.values():
        for attempt in range(3 if device.type == "cuda" else 1):
            if timed(path, tokens, target) > 1e3 and attempt:  # the first may have compiled
                break
    if device.type == "cuda" and "resolvent" in paths:
        in_one_launch = tokens.shape[1] <= JACOBI_LIMIT
        for name in ("resolvent", "eigh_fused") if in_one_launch else ("resolvent",):
            paths[f"{name}_graph"] = replayed(paths[name], tokens, target)
            timed(paths[f"{name}_graph"], tokens, target)
    return paths


def measure(device: torch.device, batch: int, n: int, rounds: int) -> list[Row]:
    """All paths on one shape."""
    tokens, target = inputs(device, batch, n)
    paths = warmed_up(device, tokens, target)
    times: dict[str, list[float]] = {name: [] for name in paths}
    order = list(paths)
    shuffle = random.Random(0)
    began = time.perf_counter()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - began > SECONDS_OF_ROUNDS[device.type]:
            break
        shuffle.shuffle(order)
        for name in order:
            times[name].append(timed(paths[name], tokens, target))
    rates = measured_rates(device)
    return [_row(device, name, of_path, times[BASELINE], rates, target) for name, of_path in times.items()]


def _row(
    device: torch.device, name: str, times: list[float], of_baseline: list[float], rates: Rates, target: Tensor
) -> Row:
    batch, n, _ = target.shape
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4)
    return Row(
        path=name,
        device=device.type,
        hardware=torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        batch=batch,
        n=n,
        dtype="float32",
        eps=EPS,
        milliseconds=float(f"{median:.4g}"),
        spread=round((high - low) / median, 3),
        speedup=float(f"{statistics.median(b / own for b, own in zip(of_baseline, times, strict=True)):.3g}"),
        rounds=len(times),
        floor_ms=float(f"{floor_ms(rates, batch, n):.3g}"),
        copy_gb_s=round(rates.copy / 1e9, 1),
        matmul_tflop_s=float(f"{rates.fp32 / 1e12:.3g}"),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        commit=commit(),
        date=time.strftime("%Y-%m-%d"),
        tf32_tflop_s=rates.tf32 and float(f"{rates.tf32 / 1e12:.3g}"),
        fp16_tflop_s=rates.fp16 and float(f"{rates.fp16 / 1e12:.3g}"),
        solver=solver_for(target),
    )


def main() -> None:
    """Measure, print, and append to the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small shapes, printed and not kept")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    if solver_for(torch.empty(1, 196, 196, device=device)) == "torch, one by one":
        print(f"torch {torch.__version__} solves matrices one by one: '{BASELINE}' is no baseline here.")
    shapes = [(b, n) for n in (36, 64, 196, 256) for b in (32, 128, 256)]
    rounds = ROUNDS[device.type]
    if arguments.quick:
        shapes, rounds = [(8, 36), (8, 64)], 3
    print(f"{'path':20}{'B':>5}{'n':>5}{'ms':>10}{'spread':>8}{'speed-up':>10}{'floor ms':>10}   {device}")
    for batch, n in shapes:
        rows = measure(device, batch, n, rounds)
        for row in rows:
            print(
                f"{row.path:20}{row.batch:5}{row.n:5}{row.milliseconds:10.4g}{row.spread:8.2f}"
                f"{row.speedup:10.3g}{row.floor_ms:10.3g}",
                flush=True,
            )
        if not arguments.quick:
            append_rows(RESULTS, [asdict(row) for row in rows])


if __name__ == "__main__":
    main()
