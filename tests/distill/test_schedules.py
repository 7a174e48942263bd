"""Schedules at their ends, their corners and in between."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill import config as configs
from distill.optim import Schedule, cosine_schedule, due, linear_warmup, scaled_lr
from distill.prototypes import Prototypes


@given(st.integers(2, 1000), st.integers(0, 20), st.floats(0.1, 10), st.floats(0, 0.1))
def test_cosine_schedule_warms_up_then_falls_to_its_end(total: int, warmup: int, start: float, end: float) -> None:
    warmup = min(warmup, total - 2)
    values = [
        cosine_schedule(s, start=start, end=end, total_steps=total, warmup_steps=warmup) for s in range(total + 3)
    ]
    rising, falling = values[:warmup], values[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert falling[0] == pytest.approx(start)
    assert values[total - 1] == pytest.approx(end, abs=1e-12) == values[-1]


def test_cosine_schedule_is_halfway_in_the_middle() -> None:
    assert cosine_schedule(50, start=1.0, end=0.0, total_steps=101) == pytest.approx(0.5)
    assert cosine_schedule(25, start=1.0, end=0.0, total_steps=101) == pytest.approx(0.5 + math.sqrt(0.125))


def test_linear_warmup_is_linear_and_then_constant() -> None:
    values = [linear_warmup(s, start=0.04, end=0.07, warmup_steps=3) for s in range(6)]
    assert values == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert linear_warmup(0, start=0.0, end=1.0, warmup_steps=0) == 1.0


def test_learning_rate_scales_from_256_images_by_either_rule() -> None:
    assert scaled_lr(5e-4, 1024, "linear") == pytest.approx(2e-3)
    assert scaled_lr(5e-4, 1024, "sqrt") == pytest.approx(1e-3)
    assert scaled_lr(5e-4, 64, "linear") == pytest.approx(1.25e-4)


def schedule_of(prototypes: Prototypes, config: configs.TrainConfig) -> Schedule:
    return Schedule(
        config, prototypes, steps_per_epoch=10, total_steps=1000, global_batch_size=512, device=torch.device("cpu")
    )


def test_a_runs_schedule_follows_its_configuration(prototypes: Prototypes) -> None:
    schedule = schedule_of(prototypes, configs.TrainConfig())
    assert schedule.lr(49) == pytest.approx(1e-3)  # 5 epochs of warm-up to 5e-4 * 512 / 256
    assert schedule.lr(0) == pytest.approx(1e-3 / 50)
    assert schedule.lr(999) == pytest.approx(1e-6)
    assert schedule.ema_momentum(0) == pytest.approx(0.994)
    assert schedule.ema_momentum(999) == pytest.approx(1.0)
    assert schedule.teacher_temps(0) == pytest.approx((0.04, 0.04))
    assert schedule.teacher_temps(150) == pytest.approx((0.055, 0.055))
    assert schedule.teacher_temps(300) == pytest.approx((0.07, 0.07))
    assert [s.item() for s in schedule.scalars(500)] == pytest.approx([0.07, 0.07, 0.5])
    assert schedule.epoch(25) == 2.5


def test_calibrated_temperatures_come_from_the_prototypes(prototypes: Prototypes) -> None:
    config = configs.TrainConfig(prototypes=configs.PrototypeConfig(teacher_temp="calibrated"))
    temps = schedule_of(prototypes, config).teacher_temps(0)
    assert temps == (prototypes.cls.calibrated_temp.item(), prototypes.patch.calibrated_temp.item())
    assert temps[0] != temps[1]


def test_evaluations_are_due_by_epoch_and_at_the_end_where_there_is_something_to_evaluate_on(
    prototypes: Prototypes,
) -> None:
    with_val = configs.TrainConfig(data=configs.DataConfig(val_data_path="val"))
    schedule = schedule_of(prototypes, with_val)
    assert [s for s in range(1, 1001) if schedule.knn_due(s)] == list(range(100, 1001, 100))
    assert not any(schedule_of(prototypes, configs.TrainConfig()).knn_due(s) for s in range(1, 1001))
    assert [s for s in range(1, 9) if due(s, 4)] == [4, 8]
    assert not due(4, 0)
