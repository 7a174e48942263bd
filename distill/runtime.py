"""What surrounds the step: command line, process group, device, compilation, signals and the finite-step guard."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import inspect
import json
import os
import signal
import subprocess
import sys
import tomllib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn

from common.device import pick_device
from common.errors import UserError
from distill.config import PRESETS, RuntimeConfig, TrainConfig, preset, read_config
from pipeline.batch import MultiCropBatch


@dataclass(frozen=True)
class Ranks:
    """This process among all: rank, world size, local rank, and its device."""

    rank: int
    world_size: int
    device: torch.device
    waiting: dist.ProcessGroup | None = None
    """On the CPU and without a time limit: what one rank does alone may take hours."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and checkpoints."""
        return self.rank == 0

    def on_main(self, work: Callable[[], object]) -> None:
        """Do `work` on the main rank while the others wait. Its UserError is raised on every rank."""
        error: UserError | None = None
        if self.is_main:
            try:
                work()
            except UserError as raised:
                error = raised
        message = [str(error) if error else None]
        if self.world_size > 1:
            dist.broadcast_object_list(message, src=0, group=self.waiting)
        if error is not None:
            raise error
        if message[0] is not None:
            raise UserError(message[0])


# What other trainers call it, where tyro's own search for the closest flag finds nothing.
_OTHER_NAMES = {
    "learning_rate": "lr", "base_lr": "lr", "wd": "weight_decay", "max_norm": "clip_grad", "steps": "max_steps",
    "batch_size": "batch_size_per_gpu", "num_workers": "num_threads", "workers": "num_threads", "model": "arch",
    "accum_iter": "accumulation_steps", "gradient_accumulation_steps": "accumulation_steps", "out": "output_dir",
    "data": "data_path", "train_data": "data_path", "val_data": "val_data_path", "save_every": "checkpoint_every",
}  # fmt: skip


def parse_config(argv: Sequence[str] | None = None) -> TrainConfig:
    """Read the command line: a loss preset first, then single flags over it.

    `--config FILE` takes the settings of a run's config.json in the preset's place. Flags are flat
    (`--dino_loss_weight`), with underscores or hyphens. An unknown flag ends the program with the closest match.

    Raises:
        UserError: no preset has that name, or a flag is another trainer's.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name, default = "five", None
    if "--config" in argv[:-1]:
        at = argv.index("--config")
        default = read_config(Path(argv[at + 1]))
        del argv[at : at + 2]
    for i, word in enumerate(argv):
        flag = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if word.startswith("--") and flag in _OTHER_NAMES:
            raise UserError(f"--{flag}: there is no such flag. Did you mean --{_OTHER_NAMES[flag]}? --help lists all.")
        # Three values and yet a flag of two: --compile, --no_compile.
        if flag in ("compile", "no_compile") and word.startswith("--") and "=" not in word:
            if argv[i + 1 : i + 2] not in (["True"], ["False"], ["None"]):
                argv[i] = f"--compile={flag == 'compile'}"
        elif word == "--preset" and i + 1 < len(argv):
            name = argv[i + 1]
        elif word.startswith("--preset="):
            name = word.partition("=")[2]
    kind = Annotated[TrainConfig, tyro.conf.OmitArgPrefixes]
    return tyro.cli(
        kind,
        args=argv,
        default=default or preset(name),
        prog="train.py",
        use_underscores=True,
        description=f"Distill a frozen ViT into a small one. Presets: {', '.join(PRESETS)}. "
        "--config FILE takes the settings of a run's config.json, single flags over it.",
    )


@contextlib.contextmanager
def process_group(config: RuntimeConfig) -> Iterator[Ranks]:
    """Join the process group that torchrun describes, or run alone without one.

    NCCL where each rank has a GPU, gloo on CPUs. The group is destroyed at the end.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    device = pick_device(config.device)
    if world_size == 1:
        yield Ranks(0, 1, device)
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        waiting: Any = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        yield Ranks(dist.get_rank(), world_size, device, waiting)
    finally:
        dist.destroy_process_group()


def configure_torch(config: RuntimeConfig, device: torch.device) -> bool:
    """Set global switches of torch for speed and for right gradients; return whether to autocast to bf16."""
    # The default runs the backward pass of fp32 losses under the forward's autocast: wrong by 280 % on the
    # SPD loss (PyTorch issue 179804).
    import torch._functorch.config as functorch_config

    functorch_config.backward_pass_autocast = "off"
    if compiles(config, device):
        # Dynamo keeps what it compiled by the line of code: an earlier run of this process would count as a recompile.
        # Here and not at the step, so that a teacher compiled to fit prototypes is not compiled again.
        torch._dynamo.reset()
        torch._dynamo.config.error_on_recompile = False
    if device.type == "cuda":
        import torch._inductor.config as inductor_config

        torch.set_float32_matmul_precision("high")
        # Its fused LayerNorm gradient is wrong in some graphs (PyTorch issue 193061).
        if hasattr(inductor_config.triton, "mix_order_reduction"):
            inductor_config.triton.mix_order_reduction = False
        inductor_config.combo_kernels = config.combo_kernels
    gc.freeze()
    # A feeder thread shares this process with a loop that is busy in Python; the default of 5 ms starves it.
    sys.setswitchinterval(1e-3)
    return config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")


def compiles(config: RuntimeConfig, device: torch.device) -> bool:
    """Return whether step and live teacher are compiled: as asked, else on a GPU, or to check the compiler."""
    return (device.type == "cuda" or config.check_compile) if config.compile is None else config.compile


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of what a run computes with, and Firn's commit where it lies in a git repository."""
    root = Path(__file__).parents[1]
    found = {"firn": tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]}
    for name in ("torch", "timm", "nvidia-dali-cuda130"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return found


def wrap_step(step: nn.Module, config: RuntimeConfig, ranks: Ranks) -> nn.Module:
    """Compile the step as one graph with static shapes, and average its gradients over the ranks."""
    if compiles(config, ranks.device):
        torch._dynamo.config.error_on_recompile = True
        # Else DDP's optimizer cuts the graph at its buckets. What that overlaps, some 100 MB of gradients, is little
        # beside what fusion across the cuts saves.
        torch._dynamo.config.optimize_ddp = False
        step.compile(backend=config.compile_backend, fullgraph=True, dynamic=False)
    if ranks.world_size == 1:
        return step
    ddp: Any = nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # by torch 2.13, where the old name warns
    wrapped: nn.Module = ddp(
        step,
        device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{"forward_sync_buffers" if renamed else "broadcast_buffers": False},
    )
    return wrapped


class StopSignal:
    """Remembers SIGTERM, SIGINT or SIGUSR1, so that the loop can end at a step of its own choosing.

    Attributes:
        received: name of the signal that came first.
        patient: whether there is a loop that will end. Before it, and at a second SIGINT, KeyboardInterrupt is raised.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.patient = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None and number == signal.SIGINT
        self.received = signal.Signals(number).name
        if again or not self.patient:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def cutting_short(self) -> Iterator[None]:
        """Let a signal end the block now, and the loop after it."""
        self.patient = False
        try:
            yield
        except KeyboardInterrupt:
            if self.received is None:
                raise
        finally:
            self.patient = True


class StepGuard:
    """Brings the flags "not finite" and "stop" of every step to all ranks and to the host, without a sync.

    On a GPU the flags of a step are read one step later. From the first step that is not finite on, every
    update is a no-op on the device, so the delay costs no weight.
    """

    def __init__(self, ranks: Ranks, run_dir: Path, seed: int, *, first_step: int = 0) -> None:
        self._ranks = ranks
        self._run_dir = run_dir
        self._seed = seed
        self._first_step = first_step
        self._flags = torch.zeros(2, device=ranks.device)
        self._stop = False
        self._pending: deque[tuple[int, MultiCropBatch, Tensor, torch.cuda.Event | None]] = deque()

    def submit(self, step: int, batch: MultiCropBatch, found_inf: Tensor, stop: bool) -> Tensor:
        """Share this step's flags; return the flag that must suppress its update, 0-d."""
        flags = torch.stack([found_inf, torch.full_like(found_inf, float(stop))])
        if self._ranks.world_size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self._flags = torch.maximum(self._flags, flags)
        if self._ranks.device.type == "cuda":
            host = torch.empty(2, pin_memory=True)
            host.copy_(self._flags, non_blocking=True)
            # Tells when the copy has arrived; waited for a step later, when it has long passed.
            event = torch.cuda.Event()
            event.record()
            self._pending.append((step, batch, host, event))
        else:
            self._pending.append((step, batch, self._flags.clone(), None))
        return self._flags[0]

    def should_stop(self, *, drain: bool = False) -> bool:
        """Return whether some rank was asked to stop; once true, it stays so.

        Args:
            drain: wait for the flags of every step submitted, the last one's too.

        Raises:
            UserError: a step was not finite. Its sample ids are in the replay file that the message names.
        """
        keep = 0 if drain or self._ranks.device.type == "cpu" else 1
        while len(self._pending) > keep:
            step, batch, flags, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            not_finite, asked = flags.tolist()
            if not_finite:
                self._report(step, batch)
            self._stop = self._stop or bool(asked)
        return self._stop

    def _report(self, step: int, batch: MultiCropBatch) -> None:
        folder = self._run_dir / "replay"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step_{step:09d}_rank_{self._ranks.rank}.json"
        path.write_text(
            json.dumps(
                {
                    "step": step,
                    "seed": self._seed,
                    "epoch": batch.epoch,
                    "view_set": batch.view_set,
                    "rows": batch.rows.tolist(),
                    "uids": [f"{uid:016x}" for uid in batch.uids],
                }
            )
        )
        again = "it resumes from the last checkpoint."
        if step == self._first_step > 0:
            # Weights can be ruined, and saved, by a step whose own loss was still finite.
            saved = self._run_dir / "checkpoints" / f"step_{step:09d}"
            again = f"this checkpoint may hold ruined weights: remove {saved}.json to resume from the one before."
        raise UserError(
            f"step {step}, rank {self._ranks.rank}: loss or gradient is not finite. No weight was changed by it. "
            f"{path} names the {len(batch.rows)} samples. Look at them with `python -m shards inspect`, then run the "
            f"same command again, with a lower --lr if the samples are sound: {again}"
        )


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of torch's generators at one step and rank (splitmix64 of the three)."""
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (x ^ (x >> 31)) & 0x7FFFFFFFFFFFFFFF
