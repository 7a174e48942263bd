"""Several real processes and nodes under torchrun: the curve of one, elastic resume, errors that end every rank."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.checkpoint import list_checkpoints

from .conftest import CROPS, MAKE_ENV, ROOT, Workplace, read_lines

Run = Callable[[list[str]], list[dict[str, Any]]]
Torchrun = Callable[..., subprocess.CompletedProcess[str]]
# fp32 sums in another order: gradients averaged over two halves of the batch instead of summed over one,
# through AdamW, which divides small gradients by their own size. Measured 2e-6; two decades of room.
FLOAT_NOISE = 2e-4
TERMS = ("loss", "dino", "ibot", "koleo", "cls", "spd", "grad_norm")


def test_two_ranks_give_the_curve_of_one_and_resume_what_one_began(
    workplace: Workplace, run_here: Run, torchrun: Torchrun, tmp_path: Path
) -> None:
    flags = ("--cache_path", workplace.cache, "--checkpoint_every", 4)
    one = run_here(workplace.flags(tmp_path / "one", *flags, "--max_steps", 8))
    done = torchrun(2, workplace.flags(tmp_path / "two", *flags, "--max_steps", 8, "--batch_size_per_gpu", 8))
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    two = read_lines(tmp_path / "two")
    for name in TERMS:
        expected = [line[name] for line in one]
        assert [line[name] for line in two] == pytest.approx(expected, rel=FLOAT_NOISE), name

    # The same run begun by one process and ended by two sees the same global batches.
    for record in (tmp_path / "one" / "checkpoints").glob("step_000000008.*"):
        record.unlink()
    done = torchrun(2, workplace.flags(tmp_path / "one", *flags, "--max_steps", 8, "--batch_size_per_gpu", 8))
    assert done.returncode == 0, done.stderr
    assert "resumes at step 4" in done.stderr
    resumed = read_lines(tmp_path / "one")
    assert [line["step"] for line in resumed] == list(range(1, 9))
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in one], rel=FLOAT_NOISE)


def test_two_nodes_build_a_cache_and_train_and_one_of_them_resumes(
    workplace: Workplace, run_here: Run, tmp_path: Path
) -> None:
    one = run_here(workplace.flags(tmp_path / "one", "--cache_path", workplace.cache, "--max_steps", 8))
    cache = tmp_path / "cache"
    build = [f"CACHE={cache}", f"ARGS=--teacher_arch local-dir:{workplace.teacher} --device cpu {' '.join(CROPS)}"]
    on_nodes(2, ["cache", f"SHARDS={workplace.shards}", *build])

    def train_on(nodes: int) -> list[float]:
        flags = workplace.flags(
            tmp_path / "run", "--max_steps", 8, "--checkpoint_every", 4, "--batch_size_per_gpu", 16 // nodes
        )
        where = [f"SHARDS={workplace.shards}", f"CACHE={cache}", f"RUN={tmp_path / 'run'}"]
        on_nodes(nodes, ["train", *where, f"ARGS=--preset five {' '.join(flags)}"])
        return [line["loss"] for line in read_lines(tmp_path / "run")]

    expected = pytest.approx([line["loss"] for line in one], rel=FLOAT_NOISE)
    assert train_on(2) == expected
    for record in (tmp_path / "run" / "checkpoints").glob("step_000000008.*"):
        record.unlink()
    assert train_on(1) == expected


def on_nodes(nodes: int, target: list[str]) -> None:
    """Run a target of the Makefile on so many nodes of one process each, by the README's command."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        endpoint = f"localhost:{probe.getsockname()[1]}"
    processes = []
    for rank in range(nodes):
        launch = f"--nnodes {nodes} --node-rank {rank} --rdzv-backend c10d --rdzv-endpoint {endpoint}"
        words = ["make", *target, f"PY={sys.executable}", f"TORCHRUN={launch}"]
        processes.append(
            subprocess.Popen(
                words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=MAKE_ENV
            )
        )
    errors = [process.communicate()[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors


COMPILED = """
import sys
from collections import Counter
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from distill.config import RuntimeConfig
from distill.losses import koleo_loss
from distill.runtime import process_group, wrap_step

class Collectives(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

graphs, counts = [], Counter()
torch._dynamo.register_backend(lambda graph, inputs: graphs.append(graph) or graph, name="counting")
crops = torch.randn(2, 8, 512, generator=torch.Generator().manual_seed(1))

with process_group(RuntimeConfig(device="cpu")) as ranks:
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(0)
        # Eight buckets' worth: DDP would cut the graph behind the first layer.
        layers = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8)))
        model = wrap_step(layers, RuntimeConfig(compile=compiled, compile_backend="counting"), ranks)
        x = crops[:, ranks.rank :: 2].clone().requires_grad_()
        model(x).square().mean().backward()
        gradients.append([p.grad for p in layers.parameters()])
    with Collectives():
        loss = koleo_loss(x, all_ranks=True)
        loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    whole = koleo_loss(torch.cat([crops[:, ::2], crops[:, 1::2]], 1)).item()
    if ranks.is_main:
        errors = [((a - b).norm() / a.norm()).item() for a, b in zip(*gradients)]
        ways = [counts[f"_c10d_functional::{name}_tensor"] for name in ("all_gather_into", "reduce_scatter")]
        print(len(graphs), max(errors), *ways, total.item() / 2 - whole)
"""


def test_under_ddp_the_step_is_one_graph_with_eager_gradients_and_koleo_one_collective_each_way(
    tmp_path: Path,
) -> None:
    (tmp_path / "compiled.py").write_text(COMPILED)
    launch = [sys.executable, "-m", "distill.launch", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, tmp_path / "compiled.py"], cwd=ROOT, capture_output=True, text=True,
        check=False, env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error::FutureWarning"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    graphs, error, gathers, scatters, difference = map(float, done.stdout.split())
    assert (graphs, gathers, scatters) == (1, 1, 1)
    assert error <= 1e-6  # the same fp32 sums, averaged in buckets
    assert abs(difference) < 1e-5


def test_an_error_on_the_ranks_ends_all_of_them_with_the_message(
    workplace: Workplace, torchrun: Torchrun, tmp_path: Path
) -> None:
    flags = workplace.flags(tmp_path / "run", "--max_steps", 2, "--cache_path", tmp_path / "absent")
    done = torchrun(2, flags)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'absent'}")

    flags = workplace.flags(
        tmp_path / "run2", "--cache_path", workplace.cache, "--lr", 1e30, "--clip_grad", 0, "--max_steps", 9
    )
    done = torchrun(2, flags)
    assert done.returncode != 0
    assert "loss or gradient is not finite" in done.stderr
    replays = sorted((tmp_path / "run2" / "replay").iterdir())
    assert len({p.name.rsplit("_rank_")[0] for p in replays}) == 1


def test_a_full_disk_at_a_checkpoint_ends_every_rank_with_the_message(
    workplace: Workplace, run_here: Run, torchrun: Torchrun, tmp_path: Path, small_disk: Callable[[int], Path]
) -> None:
    flags = ("--cache_path", workplace.cache, "--checkpoint_every", 1, "--batch_size_per_gpu", 8)
    run_here(workplace.flags(tmp_path / "whole", *flags, "--max_steps", 1))
    size = next((tmp_path / "whole" / "checkpoints").glob("*.pt")).stat().st_size
    # One checkpoint and all that lies beside it, but not a second one.
    run = small_disk(size * 5 // 3) / "run"
    done = torchrun(2, workplace.flags(run, *flags, "--max_steps", 99))
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "a checkpoint could not be written" in line]
    # Each rank says it unless torchrun, seeing the first end, is quicker; the last line repeats it in any case.
    assert errors and done.stderr.splitlines()[-1] == errors[-1]
    assert "the disk is full" in errors[0] or "allows no file of that size" in errors[0]
    # A limit on the size of files, the stand-in for a small disk, lets not even the first one pass.
    assert [saved.step for saved in list_checkpoints(run)] == ([1] if run.parent.is_mount() else [])


FAULTY = """
import atexit, os, signal, sys, time
import torch
import torch.distributed as dist
from common.errors import UserError, run_command

def work():
    fault, rank = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo")
    dist.barrier()
    if dist.get_rank() == rank:
        if fault == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        atexit.register(time.sleep, 3600)  # the other rank, whose connection breaks, is the first to end
        dist.destroy_process_group()
        raise {"user": UserError("a.tar: cut short."), "os": OSError(5, "failed", "b.tar"), "own": KeyError("c")}[fault]
    dist.all_reduce(torch.zeros(1))

sys.exit(run_command(work))
"""


@pytest.mark.parametrize(
    ("fault", "rank", "last"),
    [
        ("user", 0, "error: a.tar: cut short."),
        ("os", 1, "error: b.tar: failed. Check the path and its permissions."),
        ("own", 1, "error: KeyError: 'c'. This is a fault of the program: see its traceback above."),
        ("SIGKILL", 1, "error: rank 1 was ended by SIGKILL, as the system does when memory runs out. "),
    ],
)
def test_the_last_line_is_of_the_rank_that_failed_and_not_of_those_that_it_took_along(
    tmp_path: Path, fault: str, rank: int, last: str
) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    launch = [sys.executable, "-m", "distill.launch", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, tmp_path / "faulty.py", fault, str(rank)], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(last), done.stderr
