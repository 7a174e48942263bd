"""The log-Euclidean loss, forward and backward, by each path, against eigh with the Loewner gradient.

Each path computes the loss of the same tokens [B, n, 384] against the same teacher logarithms, and its gradient
in the tokens. Rounds go through all paths in random order and a ratio is taken within a round; figures are
medians. The floor is the time of the least traffic and arithmetic at the copy bandwidth and matrix product rate
measured in the same run.

    python -m benchmarks.bench_spd [--quick] [--device cpu|cuda] [--write_choice]
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.spd import choice, log_euclidean_loss, spd_logm, token_spd, triton_launch
from kernels.spd.eigh import plain_eigh_loss
from kernels.spd.poles import rational_log
from kernels.spd.precision import full_fp32
from kernels.spd.resolvent import cholesky_loss
from kernels.spd.solver import batched_eigh, cupy_eigh_available, torch_loops_over_matrices
from kernels.spd.synthetic_tokens import synthetic_tokens

RESULTS = Path(__file__).parent / "results" / "spd.csv"
CHANNELS = 384
EPS = 1.0
BASELINE = "eigh_loewner"
CHOICE_BATCH = 128
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
    return _whole(tokens, lambda matrices: plain_eigh_loss(*batched_eigh(matrices), target, True))


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
        batched_eigh(token_spd(tokens, eps=EPS))
    return torch.zeros((), device=tokens.device)


def paths_for(device: torch.device) -> dict[str, Path_]:
    """The paths that exist on this device."""
    paths: dict[str, Path_] = {
        "autograd_eigh": autograd_eigh,
        BASELINE: eigh_loewner,
        "resolvent_cholesky": resolvent_cholesky,
        "solver_only": solver_only,
    }
    if triton_launch.spectral_fits(torch.empty(1, 1, 1, device=device)):
        paths["eigh_fused"] = public("eigh")
        paths["resolvent"] = public("resolvent")
    return paths


def timed(path: Path_, tokens: Tensor, target: Tensor) -> float:
    """Milliseconds of forward and backward, the device idle before and after."""
    tokens.grad = None
    on_gpu = tokens.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss = path(tokens, target)
    if loss.requires_grad:
        loss.backward()
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


@functools.cache
def measured_rates(device: torch.device) -> tuple[float, float]:
    """Bytes a second of a copy (read and write) and fp32 operations a second of a matrix product."""

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(8):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.empty(size // 4, device=device)
    destination = torch.empty_like(source)
    side = 4096 if device.type == "cuda" else 1024
    square = torch.randn(side, side, device=device)
    with full_fp32(device):
        matmul = best(lambda: square @ square)
    return 2 * size / best(lambda: destination.copy_(source)), 2 * side**3 / matmul


def floor_ms(device: torch.device, batch: int, n: int) -> float:
    """Read A and T, write dA; n^3 (inverse) + 4 n^3 (gradient) operations a pole, the Gram and its gradient."""
    bandwidth, rate = measured_rates(device)
    num_poles = len(rational_log(EPS, n).poles)
    operations = batch * (5 * num_poles * n**3 + 6 * n**2 * CHANNELS)
    traffic = batch * (3 * n**2 + 3 * n * CHANNELS) * 4
    return max(operations / rate, traffic / bandwidth) * 1e3


def hardware_name(device: torch.device) -> str:
    """The processor's own name for itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in _lines(cpuinfo) if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _commit() -> str:
    """The commit, with a mark if the measured code differs from it."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parents[1]
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=root)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "kernels", "benchmarks/bench_spd.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-changed" if changed else "")


def measure(device: torch.device, batch: int, n: int, rounds: int) -> list[Row]:
    """All paths on one shape."""
    tokens = synthetic_tokens("typical", 4, n, CHANNELS, seed=1).float().repeat(-(-batch // 4), 1, 1)[:batch]
    tokens = (tokens + 1e-3 * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2))).to(device)
    tokens.requires_grad_()
    teacher = synthetic_tokens("typical", 4, n, 1024, seed=3).float().repeat(-(-batch // 4), 1, 1)[:batch]
    with torch.no_grad():
        target = spd_logm(token_spd(teacher.to(device), eps=EPS), eps=EPS)
    paths = paths_for(device)
    for path in paths.values():  # compile, warm caches and pools
        for _ in range(3 if device.type == "cuda" else 1):
            timed(path, tokens, target)
    times: dict[str, list[float]] = {name: [] for name in paths}
    order = list(paths)
    shuffle = random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(timed(paths[name], tokens, target))
    bandwidth, rate = measured_rates(device)
    rows = []
    for name, of_path in times.items():
        median = statistics.median(of_path)
        low, _, high = statistics.quantiles(of_path, n=4)
        speedup = statistics.median(base / own for base, own in zip(times[BASELINE], of_path, strict=True))
        rows.append(
            Row(
                name,
                device.type,
                hardware_name(device),
                batch,
                n,
                "float32",
                EPS,
                float(f"{median:.4g}"),
                round((high - low) / median, 3),
                float(f"{speedup:.3g}"),
                rounds,
                float(f"{floor_ms(device, batch, n):.3g}"),
                round(bandwidth / 1e9, 1),
                float(f"{rate / 1e12:.3g}"),
                torch.get_num_threads(),
                torch.__version__,
                _commit(),
                time.strftime("%Y-%m-%d"),
            )
        )
    return rows


def append(path: Path, rows: Sequence[Any]) -> None:
    """Adds the rows to the table, with a header if it is new."""
    new = not path.exists()
    path.parent.mkdir(exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_choice(rows: list[Row]) -> None:
    """Keeps for "auto" the figures of this device at the usual batch; rows of other devices stay."""
    device = rows[0].device
    known = [row for row in choice.load_measurements() if row.device != device]
    found = {(row.path, row.n): row for row in rows if row.batch == CHOICE_BATCH}
    ours = ("eigh_fused", "resolvent") if device == "cuda" else (BASELINE, "resolvent_cholesky")
    for n in sorted({row.n for row in rows}):
        eigh, resolvent = (found[path, n] for path in ours)
        ratio = float(f"{resolvent.speedup / eigh.speedup:.3g}")
        known.append(choice.Measurement(device, eigh.hardware, n, eigh.milliseconds, ratio))
    lines = ",\n".join(json.dumps(asdict(row)) for row in known)
    choice.MEASURED_PATH.write_text(f"[\n{lines}\n]\n")


def main() -> None:
    """Measure, print, and append to the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small shapes, printed and not kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write_choice", action="store_true", help="let backend='auto' use these figures")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and torch_loops_over_matrices() and not cupy_eigh_available():
        print(f"torch {torch.__version__} solves matrices one by one: '{BASELINE}' is no baseline here.")
    shapes = [(b, n) for n in (36, 64, 196, 256) for b in (32, 128, 256)]
    rounds = 30 if device.type == "cuda" else 7
    if arguments.quick:
        shapes, rounds = [(8, 36), (8, 64)], 3
    print(f"{'path':20}{'B':>5}{'n':>5}{'ms':>10}{'spread':>8}{'speed-up':>10}{'floor ms':>10}   {device}")
    kept: list[Row] = []
    for batch, n in shapes:
        rows = measure(device, batch, n, rounds)
        for row in rows:
            print(
                f"{row.path:20}{row.batch:5}{row.n:5}{row.milliseconds:10.4g}{row.spread:8.2f}"
                f"{row.speedup:10.3g}{row.floor_ms:10.3g}",
                flush=True,
            )
        kept += rows
        if not arguments.quick:
            append(RESULTS, rows)
    if arguments.write_choice and not arguments.quick:
        write_choice(kept)


if __name__ == "__main__":
    main()
