"""The finite-step guard, the metrics log and the process set-up, in one process."""

from __future__ import annotations

import io
import json
import logging
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from distill.config import RuntimeConfig
from distill.metrics import PHASES, MetricsLog, PhaseClock, kept_messages
from distill.runtime import Ranks, StepGuard, StopSignal, configure_torch, process_group
from distill.step import METRICS
from pipeline.batch import MultiCropBatch

ALONE = Ranks(0, 1, torch.device("cpu"))


def batch_of(rows: list[int]) -> MultiCropBatch:
    b = len(rows)
    empty = torch.zeros(0, dtype=torch.uint8)
    return MultiCropBatch(
        rows=np.array(rows), uids=np.array([r + 10 for r in rows], np.uint64), image_crcs=np.zeros(b, np.uint32),
        view_set=1, epoch=3, global_crops=empty, local_crops=empty, teacher_crops=None,
        masks=torch.zeros(0, dtype=torch.bool), masked_indices=torch.zeros(0, dtype=torch.int64),
        labels=torch.zeros(b, dtype=torch.int64), global_crops_spec=np.zeros((b, 2, 6), np.int32),
    )  # fmt: skip


def test_a_step_that_is_not_finite_stops_the_run_and_leaves_its_samples_in_a_replay_file(tmp_path: Path) -> None:
    guard = StepGuard(ALONE, tmp_path, seed=5)
    assert guard.submit(7, batch_of([1]), torch.tensor(0.0), stop=False).item() == 0
    assert guard.should_stop() is False
    assert guard.submit(8, batch_of([4, 2]), torch.tensor(1.0), stop=False).item() == 1
    # Until the host has read the flag, later updates stay suppressed.
    assert guard.submit(9, batch_of([3]), torch.tensor(0.0), stop=False).item() == 1
    with pytest.raises(UserError, match="step 8, rank 0: loss or gradient is not finite"):
        guard.should_stop()
    replay = json.loads((tmp_path / "replay" / "step_000000008_rank_0.json").read_text())
    assert replay == {
        "step": 8, "seed": 5, "epoch": 3, "view_set": 1, "rows": [4, 2],
        "uids": ["000000000000000e", "000000000000000c"],
    }  # fmt: skip


def test_a_stop_request_is_seen_once_it_was_shared(tmp_path: Path) -> None:
    guard = StepGuard(ALONE, tmp_path, seed=0)
    guard.submit(1, batch_of([1]), torch.tensor(0.0), stop=True)
    assert guard.should_stop() is True
    assert guard.should_stop(drain=True) is True


def test_signals_are_remembered_and_a_second_interrupt_interrupts() -> None:
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        stop = StopSignal()
        assert stop.received is None
        stop.patient = True
        signal.raise_signal(signal.SIGUSR1)
        assert stop.received == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        # Before there is a loop that ends at a step, the first one does, whichever it is.
        with pytest.raises(KeyboardInterrupt):
            StopSignal()
            signal.raise_signal(signal.SIGTERM)
        stop, reached = StopSignal(), []
        stop.patient = True
        with stop.cutting_short():
            signal.raise_signal(signal.SIGTERM)
            reached.append("the end")
        assert (stop.received, stop.patient, reached) == ("SIGTERM", True, [])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def metrics_of(loss: float) -> torch.Tensor:
    values = torch.zeros(len(METRICS))
    values[0] = loss
    return values


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_log_holds_means_over_the_steps_since_the_last_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(tmp_path, RuntimeConfig(log_every=2), ALONE, first_step=0, total_steps=3)
    for step, loss in enumerate((1.0, 2.0, 6.0), start=1):
        log.phases.mark("data_wait")
        log.phases.mark("")
        log.add(metrics_of(loss), torch.tensor(loss * 10), images=4)
        if log.due(step):
            log.flush(step, lr=0.5)
    log.close()
    written = lines(tmp_path)
    found = [(x["step"], x["loss"], x["grad_norm"], x["lr"]) for x in written]
    assert found == [(2, 1.5, 15.0, 0.5), (3, 6.0, 60.0, 0.5)]
    assert all(x["images_per_second"] > 0 and 0 <= x["data_wait"] <= 1 for x in written)
    assert "step 3/3" in capsys.readouterr().err
    assert "images/s over 12 images" in log.summary()


def test_lines_beyond_the_step_that_is_resumed_are_dropped_with_a_torn_last_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 1}\n{"step": 4, "loss": 2}\n{"step": 5, "lo')
    MetricsLog(tmp_path, RuntimeConfig(), ALONE, first_step=3, total_steps=9).close()
    assert lines(tmp_path) == [{"step": 2, "loss": 1}]


# TensorBoard's own thread dies of the full disk.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_line_that_the_disk_refuses_fails_the_run_at_its_end(
    small_disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str], tensorboard: bool
) -> None:
    run = small_disk(64 << 10)
    config = RuntimeConfig(log_every=1, tensorboard=tensorboard)
    log = MetricsLog(run, config, ALONE, first_step=0, total_steps=3)
    with pytest.raises(OSError), (run / "metrics.jsonl").open("ab", buffering=0) as file:
        while True:
            file.write(b" " * 512)
    assert not log.failed
    for step in range(1, 200 if tensorboard else 2):  # more than a page of the disk holds
        log.add(metrics_of(1.0), torch.tensor(1.0), images=4)
        log.flush(step, lr=0.1, epoch=0.5)
        assert log.failed
    with pytest.raises(UserError, match=r"metrics.jsonl: (the disk is full|the system allows no file of that size)"):
        log.close()


def test_start_up_is_neither_waiting_nor_a_steps_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("distill.metrics.time.perf_counter", lambda: now)
    log = MetricsLog(tmp_path, RuntimeConfig(log_every=2), ALONE, first_step=0, total_steps=4)
    now += 10.0
    log.phases.mark("data_wait")
    now += 1000.0
    log.phases.mark("targets")
    now += 500.0
    log.begin()
    for step in (1, 2, 3, 4):
        for phase, seconds in (("student", 2.0), ("optimizer", 1.0), ("data_wait", 1.0)):
            log.phases.mark(phase)
            now += seconds
        log.phases.mark("")
        log.add(metrics_of(1.0), torch.tensor(1.0), images=8)
        if log.due(step):
            log.flush(step)
    log.close()
    found = [(x["step_time"], x["images_per_second"], x["data_wait"], x["student_share"]) for x in lines(tmp_path)]
    assert found == [(4.0, 2.0, 0.25, 0.5)] * 2
    assert log.summary().startswith("2.0 images/s over 32 images; time: data_wait 25.0%, targets 0.0%, student 50.0%")


def test_on_a_terminal_the_bar_leaves_start_up_out_and_the_text_log_still_has_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", terminal)
    log = MetricsLog(tmp_path, RuntimeConfig(log_every=1), ALONE, first_step=0, total_steps=3)
    assert log._bar is not None
    log._bar.start_t -= 1e6
    log._bar.last_print_t -= 1e6
    log.begin()
    assert log._bar.format_dict["elapsed"] < 1e5
    log.add(metrics_of(2.0), torch.tensor(1.0), images=4)
    log.flush(1)
    log.close()
    assert "  loss 2  " in (tmp_path / "train.log").read_text()
    assert "step 1/3" not in terminal.getvalue()


@pytest.mark.parametrize(
    ("wait", "student", "advice"),
    [
        (8.0, 2.0, "The loader is the limit: raise --num_threads"),
        (1.0, 9.0, "limit, as it should be. 10.0% go on waiting for the loader: raise --num_threads"),
        (0.1, 9.9, "The student's forward and backward pass is the limit, as it should be."),
    ],
)
def test_the_advice_is_of_what_takes_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: float, student: float, advice: str
) -> None:
    times = iter([0.0, 0.0, wait, wait + student, wait + student, wait + student])
    monkeypatch.setattr("distill.metrics.time.perf_counter", lambda: next(times))
    log = MetricsLog(tmp_path, RuntimeConfig(), ALONE, first_step=0, total_steps=1)
    for phase in ("data_wait", "student", ""):
        log.phases.mark(phase)
    log.add(metrics_of(1.0), torch.tensor(1.0), images=8)
    log.flush(1)
    said = log.summary().splitlines()[-1]
    assert advice in said and ("loader" in said) == (wait > 0.1)


def test_what_is_said_logged_and_failed_is_kept_in_the_text_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for attempt in ("first", "second"):
        with pytest.raises(UserError), kept_messages(tmp_path):
            log = MetricsLog(tmp_path, RuntimeConfig(log_every=1), ALONE, first_step=0, total_steps=3)
            logging.getLogger("pipeline").warning("%s: a bad sample", attempt)
            log.say(f"{attempt} at 100 %")
            log.add(metrics_of(2.0), torch.tensor(1.0), images=4)
            log.flush(1)
            raise UserError(f"{attempt} failed.")
    logging.getLogger("pipeline").warning("after the run")
    written = (tmp_path / "train.log").read_text()
    found = re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*?)(?:  eta.*)?$", written, re.MULTILINE)
    assert found == [
        text for attempt in ("first", "second")
        for text in (f"{attempt}: a bad sample", f"{attempt} at 100 %", "step 1/3", f"error: {attempt} failed.")
    ]  # fmt: skip
    assert "first at 100 %\nstep 1/3" in capsys.readouterr().err


def test_a_text_log_that_the_disk_refuses_fails_the_run_as_the_metrics_do(
    small_disk: Callable[[int], Path],
) -> None:
    run = small_disk(64 << 10)
    log = MetricsLog(run, RuntimeConfig(), ALONE, first_step=0, total_steps=3)
    with kept_messages(run):
        with pytest.raises(OSError), (run / "train.log").open("ab", buffering=0) as file:
            while True:
                file.write(b" " * 512)
        logging.getLogger("pipeline").warning("of another module: lost")
        assert not log.failed
        log.say("of the run")
    assert log.failed
    with pytest.raises(UserError, match=r"train.log: (the disk is full|the system allows no file of that size)"):
        log.close()


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, RuntimeConfig(log_every=1, tensorboard=True), ALONE, first_step=0, total_steps=2)
    for step, loss in ((1, 3.0), (2, 1.5)):
        log.add(metrics_of(loss), torch.tensor(1.0), images=4)
        log.flush(step, lr=0.5)
    log.event(2, knn_top1=75.0)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(x.step, x.value) for x in events.Scalars("loss")] == [(1, 3.0), (2, 1.5)]
    assert [(x.step, x.value) for x in events.Scalars("knn_top1")] == [(2, 75.0)]


def test_the_phase_clock_gives_each_phase_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 7.0, 8.0, 20.0, 21.0])
    monkeypatch.setattr("distill.metrics.time.perf_counter", lambda: next(times))
    clock = PhaseClock(torch.device("cpu"))
    for phase in ("data_wait", "targets", "student", "optimizer", "", "data_wait", ""):
        clock.mark(phase)
    assert clock.read() == {"data_wait": 2.0, "targets": 2.0, "student": 4.0, "optimizer": 1.0}
    assert clock.read() == dict.fromkeys(PHASES, 0.0)


def test_one_process_needs_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group(RuntimeConfig(device="cpu")) as ranks:
        assert ranks == ALONE
        assert not torch.distributed.is_initialized()
        ranks.on_main(lambda: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="provokes the error of a machine without a GPU")
def test_a_wanted_gpu_that_is_not_there_is_an_error() -> None:
    expected = pytest.raises(UserError, match=r"--device cuda: torch .* sees no CUDA device")
    with expected, process_group(RuntimeConfig(device="cuda")):
        pass


def test_torch_is_configured_for_right_gradients_and_bf16_only_on_gpus() -> None:
    import torch._functorch.config as functorch_config

    assert configure_torch(RuntimeConfig(), torch.device("cpu")) is False
    assert configure_torch(RuntimeConfig(precision="bf16"), torch.device("cpu")) is True
    assert functorch_config.backward_pass_autocast == "off"


def test_small_kernels_are_joined_only_where_asked_for() -> None:
    import torch._inductor.config as inductor_config

    precision = torch.get_float32_matmul_precision()
    with inductor_config.patch(combo_kernels=False):
        for asked in (True, False):
            configure_torch(RuntimeConfig(combo_kernels=asked), torch.device("cuda"))
            assert inductor_config.combo_kernels == asked
    torch.set_float32_matmul_precision(precision)
