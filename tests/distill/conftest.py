"""Small real models, prototypes and batches shared by the tests of the learning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from distill.config import LossConfig, PrototypeConfig, StudentConfig
from distill.models import create_student
from distill.prototypes import Prototypes, fit_prototypes
from distill.step import DistillStep, StepInputs, StepScalars
from distill.teacher import TeacherTargets

TEACHER_DIM, PATCHES, IMAGES = 96, 36, 6


@pytest.fixture(scope="session")
def student_config() -> StudentConfig:
    # LayerScale 0.5 instead of 1e-5: blocks that do nothing would hide errors in them.
    return StudentConfig(embed_dim=64, depth=3, num_heads=2, patch_size=8, layer_scale=0.5)


@pytest.fixture(scope="session")
def prototypes() -> Prototypes:
    generator = torch.Generator().manual_seed(1)
    targets = TeacherTargets(
        cls=torch.randn(64, 2, TEACHER_DIM, generator=generator) + 0.5,
        patches=torch.randn(64, 2, PATCHES, TEACHER_DIM, generator=generator) - 0.5,
    )
    config = PrototypeConfig(num_prototypes=32, prototype_rows=64, prototype_iterations=5)
    return fit_prototypes([targets], config, seed=0, fingerprint={}, device=torch.device("cpu"))


@pytest.fixture
def make_step(student_config: StudentConfig, prototypes: Prototypes) -> Callable[..., DistillStep]:
    def make(weights: LossConfig | None = None, autocast: bool = False, **student: object) -> DistillStep:
        config = dataclasses.replace(student_config, **student)  # type: ignore[arg-type]
        torch.manual_seed(0)
        return DistillStep(
            create_student(config, seed=0),
            prototypes,
            config,
            weights or LossConfig(),
            student_temp=0.1,
            global_crops_size=48,
            local_crops_size=24,
            autocast=autocast,
        )

    return make


@pytest.fixture
def inputs() -> StepInputs:
    generator = torch.Generator().manual_seed(2)

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    masks = torch.zeros(2 * IMAGES, PATCHES, dtype=torch.bool)
    for image in range(IMAGES):
        view = image % 2
        masks[view * IMAGES + image, torch.randperm(PATCHES, generator=generator)[:12]] = True
    return StepInputs(
        global_crops=pixels(2 * IMAGES, 48, 48, 3),
        local_crops=pixels(4 * IMAGES, 24, 24, 3),
        masks=masks,
        masked_indices=masks.flatten().nonzero().flatten(),
        teacher_cls=torch.randn(IMAGES, 2, TEACHER_DIM, generator=generator),
        teacher_patches=torch.randn(IMAGES, 2, PATCHES, TEACHER_DIM, generator=generator),
    )


@pytest.fixture
def scalars() -> StepScalars:
    return StepScalars(torch.tensor(0.05), torch.tensor(0.06), torch.tensor(1.0))
