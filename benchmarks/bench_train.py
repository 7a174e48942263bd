"""The training step on synthetic batches, no data and no weights: images/s, time by phase, memory, its floor.

python -m benchmarks.bench_train [--batch 64 128 256] [--preset recommended] [--only compiled]

Rows, each a step of its own: `eager`, `compiled`, `compiled, live teacher` (a ViT-L/16's forward pass on the two global
crops before it). On a GPU it is the step of the defaults, ViT-S/16 with 2 x 224 and 8 x 96 pixels; on a CPU a small
student stands in, and the ratios of the rows are what it says.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.results import Measurement, append_measurements, print_table
from common.errors import run_command
from distill.config import OptimConfig, RuntimeConfig, TrainConfig, preset
from distill.metrics import PhaseClock
from distill.models import create_backbone, create_student
from distill.optim import StudentEma, clip_gradients, create_optimizer, set_lr, skip_update
from distill.prototypes import PrototypeBank, Prototypes
from distill.runtime import Ranks, configure_torch, process_group, wrap_step
from distill.step import DistillStep, StepInputs
from distill.teacher import FrozenTeacher

ROWS = ("eager", "compiled", "compiled, live teacher")
PHASES = ("teacher", "forward", "backward", "optimizer")
# Dense bf16 products of a card, FLOP/s, from NVIDIA's data sheets of H100 SXM and H200 SXM (2023).
PEAKS = {"H100": 989e12, "H200": 989e12}
_WARM_UP = 3


@dataclass(frozen=True)
class BenchArgs:
    """Options of the measurement."""

    batch: tuple[int, ...] = ()
    """Images of a step: 64 128 256 on a GPU, 8 on a CPU."""
    preset: str = "recommended"
    """Losses and crops, as `train.py --preset` has them."""
    only: Literal["", "eager", "compiled", "compiled, live teacher"] = ""
    """One row alone."""
    steps: int = 20
    """Steps that are measured, after 3 that are not."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    results: Path = Path(__file__).parent / "results" / "train.csv"
    """CSV file of the rows."""


def build(config: TrainConfig, batch: int, ranks: Ranks, *, autocast: bool) -> tuple[DistillStep, StepInputs]:
    """Return a step with random prototypes, and one batch of noise for it."""
    device, crops, width = ranks.device, config.crops(), 1024
    generator = torch.Generator().manual_seed(0)
    banks = []
    for _ in range(2):
        bank = PrototypeBank(config.prototypes.num_prototypes, width)
        bank.weight.copy_(F.normalize(torch.randn(bank.weight.shape, generator=generator), dim=-1))
        banks.append(bank)
    step = DistillStep(
        create_student(config.student, seed=0), Prototypes(banks[0], banks[1], {}), config.student, config.losses,
        student_temp=config.prototypes.student_temp, global_crops_size=crops.global_crops_size,
        local_crops_size=crops.local_crops_size, autocast=autocast,
    ).to(device)  # fmt: skip
    g, n = crops.num_global_crops, crops.num_patches
    masks = torch.zeros(g * batch, n, dtype=torch.bool)
    for i in range(batch):  # one crop of each image, as the loader masks them
        masks[i + batch * (i % g), torch.randperm(n, generator=generator)[: crops.num_masked_patches]] = True
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def pixels(count: int, side: int) -> Tensor:
        return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)

    inputs = StepInputs(
        pixels(g * batch, crops.global_crops_size),
        # Without the DINO loss no local crop is read: train.py asks the loader for none.
        pixels(crops.num_local_crops * batch if config.losses.dino_loss_weight else 0, crops.local_crops_size),
        masks,
        masks.flatten().nonzero().flatten(),
        torch.randn(batch, g, width, generator=generator).to(dtype),
        torch.randn(batch, g, n, width, generator=generator).to(dtype),
    )
    return step, StepInputs(*(x.to(device) for x in inputs))


def measure(config: TrainConfig, row: str, batch: int, steps: int, ranks: Ranks) -> list[Measurement]:
    """Run the steps of one row and return its measurements."""
    runtime = replace(config.runtime, compile=row != "eager")
    autocast = configure_torch(runtime, ranks.device)
    step, inputs = build(config, batch, ranks, autocast=autocast)
    teacher = _teacher(config, ranks.device) if "teacher" in row else None
    scalars = tuple(torch.tensor(value, device=ranks.device) for value in (0.07, 0.07, 1.0))
    with FlopCounterMode(display=False) as counter:
        step(*inputs, *scalars)[0].backward()
    step.zero_grad(set_to_none=True)
    optimizer, ema = create_optimizer(step, OptimConfig()), StudentEma(step.student)
    model = wrap_step(step, runtime, ranks)
    set_lr(optimizer, 1e-4)

    def run() -> PhaseClock:
        clock = PhaseClock(ranks.device, PHASES)
        if teacher:
            clock.mark("teacher")
            teacher(inputs.global_crops, inputs.teacher_cls.shape[1])
        clock.mark("forward")
        loss, metrics = model(*inputs, *scalars)
        clock.mark("backward")
        loss.backward()
        clock.mark("optimizer")
        _, not_finite = clip_gradients(step.parameters(), 3.0, metrics[0])
        skip_update(optimizer, not_finite)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step.student, 0.994)
        clock.mark("")
        return clock

    for _ in range(_WARM_UP):
        run()
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clocks = [run() for _ in range(steps)]
    if ranks.device.type == "cuda":  # the clocks may be read when the device is idle
        torch.cuda.synchronize()
    seconds = [clock.read() for clock in clocks]
    return _measurements(f"{config.preset}, batch {batch}, {row}", batch, counter.get_total_flops(), seconds)


def _measurements(name: str, batch: int, flops: int, seconds: Sequence[dict[str, float]]) -> list[Measurement]:
    totals = [sum(of_step.values()) for of_step in seconds]
    note = f"{flops / batch / 1e9:.2f} GFLOP an image in the student's products"
    if torch.cuda.is_available():
        note += f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most"
        peak = next((peak for card, peak in PEAKS.items() if card in torch.cuda.get_device_name()), None)
        if peak:
            floor, share = 1e3 * flops / peak, flops / peak / statistics.median(totals)
            note += f", floor of the products {floor:.1f} ms, MFU {share:.1%}"
    rows = [Measurement(name, "images/s", tuple(batch / total for total in totals), note)]
    rows += [
        Measurement(f"{name}: {phase}", "ms", tuple(1e3 * of_step[phase] for of_step in seconds))
        for phase in PHASES
        if phase != "teacher" or "teacher" in name
    ]
    return rows


def _teacher(config: TrainConfig, device: torch.device) -> Callable[..., object]:
    """A compiled ViT-L/16 with random weights; a small one on a CPU."""
    size = config.data.global_crops_size
    small = {} if device.type == "cuda" else {"embed_dim": 192, "depth": 2, "num_heads": 3}
    args = {"img_size": size, "dynamic_img_size": False} | small
    arch = "vit_large_patch16_dinov3"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher = FrozenTeacher(
        create_backbone(arch, model_args=args), arch=arch, img_size=size, dtype=dtype, device=device
    )
    teacher.compile()
    return teacher


def main() -> int:
    """Measure, print the table and the ratios, append the rows; returns the exit status."""
    args = tyro.cli(BenchArgs, prog="python -m benchmarks.bench_train", use_underscores=True, description=__doc__)
    return run_command(lambda: bench(args))


def bench(args: BenchArgs) -> None:
    """Measure each row at each batch."""
    config = preset(args.preset)
    with process_group(RuntimeConfig(device=args.device)) as ranks:
        if ranks.device.type != "cuda":
            config = replace(
                config, student=replace(config.student, embed_dim=64, depth=2, num_heads=2),
                prototypes=replace(config.prototypes, num_prototypes=512),
                data=replace(config.data, global_crops_size=96, local_crops_size=48),
            )  # fmt: skip
        rows: list[Measurement] = []
        for batch in args.batch or ((64, 128, 256) if ranks.device.type == "cuda" else (8,)):
            medians = {}
            for row in [args.only] if args.only else ROWS:
                measured = measure(config, row, batch, args.steps, ranks)
                medians[row] = measured[0].median
                rows += measured
            for row in list(medians)[1:]:
                print(f"batch {batch}: {row} over eager: {medians[row] / medians['eager']:.2f}", flush=True)
        print_table(rows)
        append_measurements(args.results, rows)


if __name__ == "__main__":
    sys.exit(main())
