"""The automatic backend follows measured rows, and the solver says where torch would loop."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.spd import choice, cusolver, solver, spd_logm
from kernels.spd.choice import Measurement, choose

CPU = Measurement("cpu", "a processor", 36, eigh_ms=1.0, resolvent_speedup=0.5)
ROWS = (
    CPU,
    Measurement("cpu", "a processor", 256, eigh_ms=9.0, resolvent_speedup=3.0),
    Measurement("cuda", "a card", 64, eigh_ms=0.1, resolvent_speedup=0.5),
    Measurement("cuda", "a card", 196, eigh_ms=5.0, resolvent_speedup=7.14),
)


@pytest.mark.parametrize(
    ("device", "n", "expected"),
    [
        ("cpu", 7, "eigh"),
        ("cpu", 64, "eigh"),
        ("cpu", 196, "resolvent"),
        ("cuda", 49, "eigh"),
        ("cuda", 144, "resolvent"),
    ],
)
def test_auto_takes_what_was_fastest_at_the_nearest_measured_size(device, n, expected):
    name, reason = choose(device, n, torch.float32, ROWS)
    assert name == expected
    assert "measured at n =" in reason


def test_level_times_go_to_the_exact_path():
    assert Measurement("cpu", "a processor", 36, eigh_ms=1.05, resolvent_speedup=1.05).fastest == "eigh"
    assert Measurement("cpu", "a processor", 36, eigh_ms=1.2, resolvent_speedup=1.2).fastest == "resolvent"


def test_auto_without_measurements_says_so():
    assert choose("cuda", 196, torch.float32, (CPU,)) == (
        "resolvent",
        "not measured on this kind of device; no wait for the host",
    )
    assert choose("mps", 196, torch.float32, ROWS) == ("eigh", "not measured on this kind of device")


def test_auto_is_exact_in_float64_and_diagonalises_above_the_limit():
    assert choose("cuda", 196, torch.float64, ROWS)[0] == "eigh"
    assert choose("cuda", 257, torch.float32, ROWS)[0] == "eigh"


def test_checked_in_rows_exist_for_the_cpu_and_hold_positive_times():
    rows = choice.load_measurements()
    assert {row.n for row in rows if row.device == "cpu"} >= {36, 64, 196, 256}
    assert all(row.eigh_ms > 0 and row.resolvent_speedup > 0 for row in rows)


@pytest.mark.parametrize("n", [36, 64, 196, 256])
def test_auto_gives_the_same_function_for_logarithm_and_loss_on_the_cpu(n):
    matrices = torch.eye(n)[None] * 1.5
    chosen = choice.resolve("auto", matrices)
    assert torch.equal(spd_logm(matrices, backend="auto"), spd_logm(matrices, backend=chosen))


def test_choice_is_logged_once(caplog):
    choice._resolve.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels.spd.choice"):
        for _ in range(3):
            spd_logm(torch.eye(5)[None], backend="resolvent")
    assert caplog.messages == ["SPD logarithm of 5 x 5 matrices on cpu: resolvent (asked for)"]


@pytest.mark.parametrize(
    ("version", "loops"),
    [("2.9.1", True), ("2.11.0+cu130", True), ("2.12.0", False), ("2.14.1+cu130", False), ("3.0.0", False)],
)
def test_versions_of_torch_that_loop_over_matrices(version, loops):
    assert solver.torch_loops_over_matrices(version) is loops


class _Matrices:
    """Just enough of a CUDA tensor to choose a solver by."""

    device = torch.device("cuda", 0)
    shape = (8, 196, 196)


@pytest.fixture
def looping_torch(monkeypatch):
    solver._say_once.cache_clear()
    monkeypatch.setattr(solver, "torch_loops_over_matrices", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_looping_torch_without_a_batched_solver_warns_once_and_goes_on(looping_torch, monkeypatch, caplog):
    monkeypatch.setattr(cusolver, "load_library", lambda: None)
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrices: ("values", "vectors"))
    for _ in range(2):
        assert solver.batched_eigh(_Matrices()) == ("values", "vectors")
    assert len(caplog.messages) == 1
    assert "8 times a call, and this cuSOLVER has no batched solver; install torch >= 2.12" in caplog.messages[0]


def test_looping_torch_calls_the_batched_solver_and_says_so_once(looping_torch, monkeypatch, caplog):
    monkeypatch.setattr(cusolver, "load_library", lambda: "a library")
    monkeypatch.setattr(cusolver, "batched_eigh", lambda matrices: ("batched", "batched"))
    for _ in range(2):
        assert solver.batched_eigh(_Matrices()) == ("batched", "batched")
    assert len(caplog.messages) == 1
    assert "eigh calls cuSOLVER's batched solver" in caplog.messages[0]


def test_small_matrices_stay_with_torch(looping_torch):
    small = _Matrices()
    small.shape = (8, 32, 32)
    assert solver.solver_for(small) == "torch"


def test_batched_eigh_on_the_cpu_is_torchs(monkeypatch):
    matrices = torch.diag_embed(torch.tensor([[3.0, 1.0, 2.0]]))
    values, vectors = solver.batched_eigh(matrices)
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
