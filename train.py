"""Distill a frozen ViT into a small one. Reads top to bottom: data, teacher or cache, student, resume, loop.

One process: `python train.py --data_path SHARDS`. Several: `torchrun --nproc-per-node N train.py ...`.
The same command again resumes from the newest intact checkpoint.
"""

from __future__ import annotations

if __name__ == "__main__":
    from common.interrupt import end_at_interrupt

    end_at_interrupt()

import dataclasses
import logging
import math
import shlex
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cache_tools.build import ENGINE, decoder_name
from cache_tools.fingerprint import cache_fingerprint
from cache_tools.read import TeacherCache
from common.errors import UserError, run_command
from common.locks import file_lock
from distill.checkpoint import CheckpointWriter, load_newest
from distill.config import TrainConfig, has_checkpoint, write_or_check_config
from distill.evaluation.measures import check_validation, judge_student
from distill.gradients import check_compiled_gradients, term_gradient_norms
from distill.metrics import MetricsLog, kept_messages
from distill.models import create_student, load_initial_weights, statistics_names
from distill.optim import Schedule, StudentEma, clip_gradients, create_optimizer, due, set_lr, skip_update
from distill.prototypes import PROTOTYPES, Prototypes, fit_or_share_prototypes, load_prototypes
from distill.runtime import (
    Ranks,
    StepGuard,
    StopSignal,
    compiles,
    configure_torch,
    parse_config,
    process_group,
    step_seed,
    versions,
    wrap_step,
)
from distill.step import DistillStep, StepInputs, StepScalars
from distill.teacher import FrozenTeacher, TeacherTargets, check_named_teacher, load_teacher
from kernels.spd import plan_reduction
from pipeline.batch import MultiCropBatch
from pipeline.loader import MultiCropLoader, open_loader
from pipeline.readers import in_batches, read_teacher_crops
from shards.manifest import load_manifest

_log = logging.getLogger(__name__)


def train(config: TrainConfig, ranks: Ranks) -> None:
    """Train until the last step, a stop signal, or an error. The run's folder holds all that it leaves."""
    run_dir = Path(config.runtime.output_dir)
    stop = StopSignal()
    autocast = configure_torch(config.runtime, ranks.device)
    ranks.on_main(lambda: write_or_check_config(config, run_dir, versions()))
    check_losses(config, ranks)

    # Resume: weights, optimizer, EMA and the step; order, crops and masks follow from the step.
    newest = load_newest(run_dir)
    first_step, state = newest or (0, None)
    loader_state = state["loader"] if state else None

    # Teacher outputs: from the cache, or live. Both give TeacherTargets.
    cache = open_cache(config, loader_state, ranks) if config.teacher.cache_path else None
    cached_teacher = cache.fingerprint["teacher"] if cache and config.uses_cache() else None
    ranks.on_main(lambda: check_validation(config, ranks.device, cached_teacher))
    teacher = None if config.uses_cache() else live_teacher(config, ranks)
    prototypes = obtain_prototypes(config, run_dir, cache, teacher, ranks)

    # The student, its heads and losses: one module, compiled as one graph.
    student = create_student(config.student, seed=config.runtime.seed)
    load_initial_weights(student, config.student)
    torch.manual_seed(config.runtime.seed)
    step_module = DistillStep(
        student,
        prototypes,
        config.student,
        config.losses,
        student_temp=config.prototypes.student_temp,
        global_crops_size=config.data.global_crops_size,
        local_crops_size=config.data.local_crops_size,
        autocast=autocast,
    ).to(ranks.device)
    optimizer = create_optimizer(step_module, config.optim)
    ema = StudentEma(step_module.student) if config.optim.ema_momentum else None

    if state:
        restore(state, step_module, optimizer, ema)
    model = wrap_step(step_module, config.runtime, ranks)

    global_batch_size = config.optim.batch_size_per_gpu * ranks.world_size
    loader = open_loader(
        config.data.data_path,
        device=ranks.device,
        global_batch_size=global_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.data.data_seed,
        augmentation=config.crops(),
        state=loader_state,
        view_sets=len(cache.view_sets) if cache else config.teacher.view_sets,
        teacher_crops=teacher is not None,
        on_bad_sample=config.data.on_bad_sample,
        skip_budget=config.data.skip_budget,
        **config.data.reading(),
    )
    total_steps = num_steps(config, loader.steps_per_epoch, first_step)
    schedule = Schedule(
        config,
        prototypes,
        steps_per_epoch=loader.steps_per_epoch,
        total_steps=total_steps,
        global_batch_size=global_batch_size,
        device=ranks.device,
    )
    log = MetricsLog(run_dir, config.runtime, ranks, first_step=first_step, total_steps=total_steps)
    guard = StepGuard(ranks, run_dir, config.data.data_seed, first_step=first_step)
    writer = CheckpointWriter(run_dir, config.runtime, is_main=ranks.is_main)
    teacher_patches = cache.spec.num_patches if cache else teacher.num_patches()  # type: ignore[union-attr]
    log.say(", ".join(f"{name} {version}" for name, version in versions().items()))
    log.say(describe_start(config, ranks, first_step, total_steps, teacher_patches, step_module.packed))
    if compiles(config.runtime, ranks.device):
        log.say("compiling before the first step, which takes minutes the first time and less once it is cached")

    step = first_step
    with loader:
        batches = with_targets(loader, cache, teacher, ranks, log, config.data.global_crops_number)
        while step < total_steps and not guard.should_stop():
            batch, targets, loader_state = next(batches)
            inputs = StepInputs.of(batch, targets)
            parts = inputs.micro_batches(config.optim.accumulation_steps)
            scalars = schedule.scalars(step)
            if step == first_step:
                if compiles(config.runtime, ranks.device):
                    compile_now(model, step_module.student, parts[0], scalars, log)
                if config.runtime.check_compile:
                    check_compiled_gradients(step_module, inputs, scalars, autocast=autocast)
                log.begin()

            log.phases.mark("student")
            torch.manual_seed(step_seed(config.runtime.seed, step, ranks.rank))
            metrics = torch.zeros((), device=ranks.device)
            for i, part in enumerate(parts):
                last = i == len(parts) - 1
                with nullcontext() if last or model is step_module else model.no_sync():  # type: ignore[operator]
                    loss, part_metrics = model(*part, *scalars)
                    (loss / len(parts)).backward()
                metrics = metrics + part_metrics / len(parts)

            log.phases.mark("optimizer")
            set_lr(optimizer, schedule.lr(step))
            grad_norm, not_finite = clip_gradients(step_module.parameters(), config.optim.clip_grad, metrics[0])
            stopping = stop.received is not None or writer.failed or log.failed
            skip_update(optimizer, guard.submit(step, batch, not_finite, stopping))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                ema.update(step_module.student, schedule.ema_momentum(step))
            log.phases.mark("")

            step += 1
            stop.patient = True  # from here on there is a step to end at, and progress to lose
            log.add(metrics, grad_norm, images=global_batch_size)
            if log.due(step):
                guard.should_stop(drain=True)  # the flush syncs anyway; nothing that is not finite is logged as fine
                log.flush(step, epoch=schedule.epoch(step), lr=schedule.lr(step - 1))
            if due(step, config.runtime.term_gradients_every):
                with log.paused():
                    norms = term_gradient_norms(step_module, inputs, scalars)
                log.event(step, **{f"grad_norm_{name}": value for name, value in norms.items()})
            if due(step, config.runtime.checkpoint_every) or step == total_steps:
                checkpoint(writer, step, step_module, optimizer, ema, loader_state, log)
            if schedule.knn_due(step):
                judged = ema.model if ema else step_module.student
                with log.paused():
                    ranks.on_main(partial(log_knn, judged, config, ranks, log, stop, step, schedule.epoch(step)))

        stopped = guard.should_stop(drain=True)
        if first_step < step < total_steps and stopped:
            checkpoint(writer, step, step_module, optimizer, ema, loader_state, log)
    ranks.on_main(writer.wait)
    end = f"stopped by {stop.received}" if stop.received else "stopped"
    log.say(f"{end if stopped else 'done'} at step {step}")
    log.say(log.summary())
    initial = math.prod(map(schedule.ema_momentum, range(step)))
    if ema is not None and initial > 0.05 and not stopped:
        run = f"--run {shlex.quote(str(run_dir))} --no_ema"
        log.say(
            f"The EMA still holds {initial:.0%} of the initial weights, since the run is short. Take the trained "
            f"weights instead: `python probe.py {run}`, `python -m distill.export {run}`."
        )
    if config.data.on_bad_sample == "skip":
        log.say(loader.failures.summary())
    ranks.on_main(log.close)


def compile_now(
    model: torch.nn.Module, student: torch.nn.Module, part: StepInputs, scalars: StepScalars, log: MetricsLog
) -> None:
    """Compile both passes by running them once, before the time of a step counts; nothing of the student changes."""
    start = time.perf_counter()
    statistics = {name: student.get_buffer(name).clone() for name in statistics_names(student)}
    model(*part, *scalars)[0].backward()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, before in statistics.items():  # a CNN's batch norms have seen a batch more
            student.get_buffer(name).copy_(before)
    log.say(f"compiled in {time.perf_counter() - start:.0f} s")


def open_cache(config: TrainConfig, loader_state: Mapping[str, Any] | None, ranks: Ranks) -> TeacherCache:
    """Open the view sets of the cache that the run asks for or began with, or else all that are finished.

    Refuses a cache of other crops, shards or teacher, or by the other decoder of a GPU.
    """
    path = config.teacher.cache_path
    assert path is not None
    manifest = load_manifest(config.data.data_path)
    expect = cache_fingerprint(manifest=manifest, augmentation=config.crops(), seed=config.data.data_seed)
    number = config.teacher.view_sets or (loader_state or {}).get("view_sets")
    cache = TeacherCache.open(path, expect=expect, view_sets=range(number) if number else None)
    ours = decoder_name(config.data.backend, ranks.device, hw_decoder=config.data.hw_decoder)
    theirs = cache.fingerprint["decoder"]
    if ours.endswith(ENGINE) != theirs.endswith(ENGINE):
        advice = "Leave --hw_decoder out" if ours.endswith(ENGINE) else "Give --hw_decoder"
        raise UserError(
            f"{path}: the teacher saw crops decoded by {theirs}, this run decodes by {ours}, whose pixels differ. "
            f"{advice}, or build another cache in an empty folder."
        )
    if config.uses_cache():
        ranks.on_main(lambda: check_named_teacher(config.teacher, cache.fingerprint["teacher"]))
    if ours != theirs and ranks.is_main:
        _log.warning("%s: the teacher saw crops of %s, the student sees those of %s: nearly equal", path, theirs, ours)
    return cache


def live_teacher(config: TrainConfig, ranks: Ranks) -> FrozenTeacher:
    """Load the frozen teacher, compiled like the student."""
    teacher = load_teacher(config.teacher, img_size=config.data.global_crops_size, device=ranks.device)
    if compiles(config.runtime, ranks.device):
        teacher.compile(config.runtime.compile_backend)
    return teacher


def with_targets(
    loader: MultiCropLoader,
    cache: TeacherCache | None,
    teacher: FrozenTeacher | None,
    ranks: Ranks,
    log: MetricsLog,
    num_crops: int,
) -> Iterator[tuple[MultiCropBatch, TeacherTargets, dict[str, Any]]]:
    """Yield batches, their targets, and the loader's state after them; cached rows are read one batch ahead."""
    states: deque[dict[str, Any]] = deque()

    def batches() -> Iterator[MultiCropBatch]:
        log.phases.mark("data_wait")
        for batch in loader:
            log.phases.mark("targets")
            states.append(loader.state_dict())
            yield batch
            log.phases.mark("data_wait")

    def live(teacher: FrozenTeacher) -> Iterator[tuple[MultiCropBatch, TeacherTargets]]:
        for batch in batches():
            assert batch.teacher_crops is not None
            yield batch, teacher(batch.teacher_crops, num_crops)

    if teacher is not None:
        pairs = live(teacher)
    else:
        assert cache is not None
        pairs = cache.join(batches(), device=ranks.device)
    for batch, targets in pairs:
        yield batch, targets, states.popleft()


def obtain_prototypes(
    config: TrainConfig, run_dir: Path, cache: TeacherCache | None, teacher: FrozenTeacher | None, ranks: Ranks
) -> Prototypes:
    """Load the run's prototypes; at the first start take those beside the cache, or fit them on the main rank.

    Prototypes fitted from a cache are left beside it, so that every run from it shares them, live or cached.
    """
    fingerprint = {
        "teacher": cache.fingerprint["teacher"] if cache else teacher.fingerprint(),  # type: ignore[union-attr]
        "crops": config.crops().geometry_fingerprint(),
        "data_seed": config.data.data_seed,
        "data": load_manifest(config.data.data_path).fingerprint(),
        "prototypes": dataclasses.asdict(config.fitted_prototypes()),
    }
    if cache and teacher and teacher.fingerprint() != fingerprint["teacher"]:
        raise UserError(
            f"--teacher live: the teacher is not the one that {config.teacher.cache_path} was built with. "
            "Leave --cache_path out, or give the cache's teacher."
        )
    own = run_dir / PROTOTYPES

    def obtain() -> None:
        # Those of an attempt that left no checkpoint bind nothing: its settings may have been the mistake.
        if own.is_file() and (has_checkpoint(run_dir) or load_prototypes(own).fingerprint == fingerprint):
            return
        fit_or_share_prototypes(
            lambda: token_stream(config, cache, teacher, ranks),
            config.fitted_prototypes(),
            own=own,
            shared=Path(config.teacher.cache_path) / PROTOTYPES if config.teacher.cache_path else None,
            seed=config.data.data_seed,
            fingerprint=fingerprint,
            device=ranks.device,
        )

    ranks.on_main(obtain)
    return load_prototypes(own, expect=fingerprint)


def token_stream(
    config: TrainConfig, cache: TeacherCache | None, teacher: FrozenTeacher | None, ranks: Ranks
) -> Iterator[TeacherTargets]:
    """Stream the teacher's tokens of view set 0, in the order of the shards (which is shuffled once)."""
    if cache is not None:
        yield from cache.tokens(0, device=ranks.device, dtype=torch.float32)
        return
    assert teacher is not None
    rows = min(config.fitted_prototypes().prototype_rows, load_manifest(config.data.data_path).num_rows)
    for batch in read_teacher_crops(
        config.data.data_path,
        in_batches(range(rows), config.optim.batch_size_per_gpu),
        view_set=0,
        seed=config.data.data_seed,
        augmentation=config.crops(),
        device=ranks.device,
        **config.data.reading(),
    ):
        yield teacher(batch.crops, config.data.global_crops_number)


def restore(state: dict[str, Any], step: DistillStep, optimizer: torch.optim.Optimizer, ema: StudentEma | None) -> None:
    """Load a checkpoint's state into the objects it was taken from."""
    step.load_state_dict(state["model"], strict=True)
    optimizer.load_state_dict(state["optimizer"])
    if ema is not None:
        ema.model.load_state_dict(state["ema"], strict=True)


def checkpoint(
    writer: CheckpointWriter,
    steps_taken: int,
    step: DistillStep,
    optimizer: torch.optim.Optimizer,
    ema: StudentEma | None,
    loader_state: Mapping[str, Any] | None,
    log: MetricsLog,
) -> None:
    """Write all that the next step depends on; the prototypes are among the step's buffers."""
    with log.paused():
        writer.save(
            steps_taken,
            {
                "model": step.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema.model.state_dict() if ema is not None else None,
                "loader": loader_state,
            },
        )


def num_steps(config: TrainConfig, steps_per_epoch: int, first_step: int) -> int:
    """Return the steps of the run; UserError where there are none, or fewer than were taken."""
    optim = config.optim
    total = optim.max_steps or round(optim.epochs * steps_per_epoch)
    if total < max(first_step, 1):
        flag = f"--max_steps {optim.max_steps}" if optim.max_steps else f"--epochs {optim.epochs:g}"
        raise UserError(
            f"{flag}: {total} steps of {steps_per_epoch} an epoch, and {first_step} are taken already. Give "
            f"--max_steps {max(first_step, 1)} or more."
        )
    return total


def check_losses(config: TrainConfig, ranks: Ranks) -> None:
    """UserError where KoLeo, which looks for neighbours within a micro-batch, or Proteus' masked patches find none."""
    parts, losses = config.optim.accumulation_steps, config.losses
    images = config.optim.batch_size_per_gpu // parts * (ranks.world_size if losses.koleo_all_ranks else 1)
    if losses.koleo_loss_weight and images < 2:
        raise UserError(
            f"--batch_size_per_gpu {config.optim.batch_size_per_gpu} --accumulation_steps {parts}: {images} image at a "
            "time, among which KoLeo finds no neighbour. Give a larger batch or fewer accumulation steps, or "
            "--koleo_loss_weight 0."
        )
    if losses.proteus_loss_weight and not config.crops().num_masked_patches:
        raise UserError(
            f"--mask_ratio {config.data.mask_ratio:g}: it masks none of the {config.crops().num_patches} patches, "
            "and --proteus_loss_weight needs some. Give a larger --mask_ratio or a smaller --mask_patch_size."
        )


def log_knn(
    model: torch.nn.Module,
    config: TrainConfig,
    ranks: Ranks,
    log: MetricsLog,
    stop: StopSignal,
    step: int,
    epoch: float,
) -> None:
    """Judge the student by k-NN, without labels by its teacher, and log it; a signal cuts it short."""
    with stop.cutting_short():
        measures = judge_student(model, config, ranks.device)
        log.event(step, epoch=epoch, **measures)
        said = (
            "k-NN {knn_top1:.2f} %"
            if "knn_top1" in measures
            else (
                "RankMe {rankme:.1f}; of the teacher: cosine {cosine:.3f}, of patches {patch_cosine:.3f}, "
                "{neighbours:.1f} % of its nearest neighbours"
            )
        )
        log.say(f"step {step}: {said.format_map(measures)}")


def describe_start(
    config: TrainConfig, ranks: Ranks, first_step: int, total_steps: int, teacher_patches: int, packed: bool
) -> str:
    """Return the line that says what begins, and on what."""
    side = config.data.global_crops_size // config.student.patch_size
    losses = config.losses
    reduction = plan_reduction((side, side), method=losses.spd_reduction, limit=losses.spd_max_tokens)
    source = f"targets from {config.teacher.cache_path}" if config.uses_cache() else "live teacher"
    mode = f"compiled by {config.runtime.compile_backend}" if compiles(config.runtime, ranks.device) else "eager"
    begins = f"resumes at step {first_step}" if first_step else "begins"
    plain = "" if packed else ", one pass for each crop size, since this student cannot be packed"
    koleo = grids = ""
    if teacher_patches != side**2:
        teacher_side = math.isqrt(teacher_patches)
        grids = f"; its {teacher_side} x {teacher_side} patch tokens resampled to the student's {side} x {side}"
    crops = config.crops()
    unread = "" if crops.num_local_crops == config.data.local_crops_number else ", no local crops, which no loss reads"
    if config.optim.accumulation_steps > 1 and losses.koleo_loss_weight:
        koleo = f". KoLeo looks for neighbours within each of the {config.optim.accumulation_steps} micro-batches"
    return (
        f"{config.runtime.output_dir} {begins}: {total_steps} steps of "
        f"{config.optim.batch_size_per_gpu * ranks.world_size} images on {ranks.world_size} x {ranks.device.type}, "
        f"{source}{grids}{unread}, {mode}{plain}. {reduction if losses.spd_loss_weight else 'No SPD loss'}"
        f"{koleo}"
    )


@contextmanager
def explain_memory(config: TrainConfig) -> Iterator[None]:
    """Turn "out of GPU memory" into a UserError that names the batch to try."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        batch, parts = config.optim.batch_size_per_gpu, config.optim.accumulation_steps
        more_parts = next((n for n in range(parts + 1, batch // 2 + 1) if batch % n == 0), None)
        tries = [f"--accumulation_steps {more_parts}, which keeps the global batch"] if more_parts else []
        if not has_checkpoint(Path(config.runtime.output_dir)):
            tries += [f"--batch_size_per_gpu {batch // 2} --accumulation_steps 1"] if batch > 1 else []
            tries += ["--arch vit_tiny or --local_crops_number 2"]
        raise UserError(
            f"out of GPU memory at --batch_size_per_gpu {batch} --accumulation_steps {parts} "
            f"({str(error).splitlines()[0]}). Try {', or '.join(tries) or 'a GPU with more memory'}. "
            "The run resumes from its last checkpoint."
        ) from error


@contextmanager
def only_run(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the run's folder and its train.log; UserError on every rank where another run does."""
    with ExitStack() as stack:

        def take() -> None:
            if not stack.enter_context(file_lock(run_dir / ".lock", timeout=0)):
                raise UserError(
                    f"{run_dir}: another run is at work there. Wait for it to end, or give another --output_dir."
                )
            stack.enter_context(kept_messages(run_dir))

        ranks.on_main(take)
        yield


def main() -> int:
    """Run from the command line; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def work() -> None:
        config = parse_config()
        if not config.data.data_path:
            raise UserError("--data_path: missing. Give the folder of shards, as in --data_path shards/train.")
        run_dir = Path(config.runtime.output_dir)
        with process_group(config.runtime) as ranks, only_run(run_dir, ranks), explain_memory(config):
            train(config, ranks)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
