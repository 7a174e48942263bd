"""The automatic backend by device, size and dtype; a torch that loops over matrices says so."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_spd
from kernels.spd import eigh, loss, spd_logm


@pytest.mark.parametrize(
    ("device", "n", "double", "expected"),
    [
        ("cpu", 36, False, "eigh"),
        ("cpu", 196, False, "eigh"),
        ("cuda", 49, False, "eigh"),
        ("cuda", 64, False, "eigh"),
        ("cuda", 65, False, "resolvent"),
        ("cuda", 256, False, "resolvent"),
        ("cuda", 257, False, "eigh"),
        ("cuda", 196, True, "eigh"),
    ],
)
def test_auto_is_one_launch_or_without_a_wait_on_a_gpu_and_exact_elsewhere(device, n, double, expected):
    assert loss._resolve("auto", device, n, double) == expected


@pytest.mark.parametrize("n", [36, 196])
def test_auto_gives_the_same_function_for_logarithm_and_loss_on_the_cpu(n):
    matrices = torch.eye(n)[None] * 1.5
    chosen = loss.resolve("auto", matrices)
    assert torch.equal(spd_logm(matrices, backend="auto"), spd_logm(matrices, backend=chosen))


def test_choice_is_logged_once(caplog):
    loss._resolve.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels.spd.loss"):
        for _ in range(3):
            spd_logm(torch.eye(5)[None], backend="resolvent")
    assert caplog.messages == ["SPD logarithm of 5 x 5 matrices on cpu: resolvent (asked for: resolvent)"]


@pytest.mark.parametrize(
    ("version", "loops"),
    [("2.9.1", True), ("2.11.0+cu130", True), ("2.12.0", False), ("2.14.1+cu130", False), ("3.0.0", False)],
)
def test_versions_of_torch_that_loop_over_matrices_say_so_once(version, loops, caplog):
    eigh._warn_if_torch_loops.cache_clear()
    for _ in range(2):
        eigh._warn_if_torch_loops(version)
    assert [f"torch {version} solves CUDA matrices above n = 32 one by one" in text for text in caplog.messages] == (
        [True] if loops else []
    )


class _Matrices:
    """Just enough of a CUDA tensor to choose a solver by."""

    device = torch.device("cuda", 0)

    def __init__(self, n):
        self.shape = (8, n, n)


@pytest.mark.parametrize(("library", "expected"), [(None, "torch, one by one"), ("a library", "cusolver")])
def test_the_baseline_is_batched_where_there_is_a_batched_solver(monkeypatch, library, expected):
    monkeypatch.setattr(bench_spd.cusolver, "load_library", lambda: library)
    assert bench_spd.solver_for(_Matrices(196)) == "torch"
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    assert bench_spd.solver_for(_Matrices(32)) == "torch"
    assert bench_spd.solver_for(_Matrices(196)) == expected


def test_batched_eigh_on_the_cpu_is_torchs():
    matrices = torch.diag_embed(torch.tensor([[3.0, 1.0, 2.0]]))
    values, vectors = eigh.batched_eigh(matrices)
    assert values.tolist() == [[1.0, 2.0, 3.0]]
    assert torch.equal(vectors.abs(), torch.eye(3)[[1, 2, 0]].T[None])


def test_loss_runs_where_triton_is_not_installed():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from kernels.spd import log_euclidean_loss\n"
        "for backend in ('eigh', 'resolvent'):\n"
        "    tokens = torch.eye(4)[None].requires_grad_()\n"
        "    loss = log_euclidean_loss(tokens, torch.zeros(1, 4, 4), backend=backend)\n"
        "    loss.backward()\n"
        "    print(f'{loss.item():.4f}')\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=root, capture_output=True, text=True, check=False
    )
    # log(2 I) has squared norm 4 log(2)^2, over n = 4.
    assert done.stdout.split() == ["0.4805", "0.4805"], done.stderr
