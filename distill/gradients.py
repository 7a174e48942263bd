"""Measurements on gradients: compiled against eager, and the norm that each loss term alone would give."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from distill.step import DistillStep, StepInputs, StepScalars

# Compiled and eager fp32 code differ by reassociated sums: about sqrt(tokens) * 2^-24 = 1e-5 a parameter, and 100
# times that where sums cancel.
FP32_TOLERANCE = 1e-3
# Under autocast both are off from the fp32 gradient by bf16's rounding, each in its own way: eager code rounds
# after every operation, compiled code after every kernel. 2^-9 over some ten roundings, and three times what the
# eager step is off for the parameter itself. The faults to be found are errors of 100 % and more.
BF16_TOLERANCE = 2e-2
EAGER_FACTOR = 3.0
_MEASURED_IMAGES = 16


def check_compiled_gradients(
    step: DistillStep, inputs: StepInputs, scalars: StepScalars, *, autocast: bool
) -> None:
    """Compare the compiled step's gradients with the eager step's in fp32, per parameter, on one batch.

    The optimizer's gradients are left empty. KoLeo takes part with its scheduled weight, 0 at the first step.

    Raises:
        UserError: some parameter's gradient is off by more than its limit; the message names the worst.
    """
    compiled = _gradients(step, step, inputs, scalars)
    with _recomputing(step.student):
        eager = _gradients(step, step.forward, inputs, scalars)
        step.autocast = False
        exact = _gradients(step, step.forward, inputs, scalars) if autocast else eager
        step.autocast = autocast
    # A parameter whose gradient is rounding noise has no relative error worth the name.
    floor = 1e-6 * max(g.norm().item() for g in exact.values())
    tolerance = BF16_TOLERANCE if autocast else FP32_TOLERANCE
    excess = {}
    for name, gradient in exact.items():
        scale = gradient.norm() + floor
        error, allowed = ((g[name] - gradient).norm() / scale for g in (compiled, eager))
        excess[name] = (error / (tolerance + EAGER_FACTOR * allowed)).item(), error.item()
    worst = max(excess, key=lambda name: excess[name])
    if not excess[worst][0] <= 1:
        raise UserError(
            f"--check_compile: the compiled gradient of {worst} is off by {excess[worst][1]:.2g} "
            f"with torch {torch.__version__}. Train with --no_compile, or with another version of torch."
        )


def term_gradient_norms(
    step: DistillStep, inputs: StepInputs, scalars: StepScalars
) -> dict[str, float]:
    """Return the norm of each loss term's gradient with respect to the student, unweighted.

    Runs eager on at most 16 images of this rank's batch; all ranks call it together, for KoLeo's gather.
    """
    b = inputs.teacher_cls.shape[0]
    cuts = next(k for k in range(1, b + 1) if b % k == 0 and b // k <= _MEASURED_IMAGES)
    sample = inputs.micro_batches(cuts)[0]
    terms, _ = step.terms(sample, scalars)
    parameters = [p for p in step.student.parameters() if p.requires_grad]
    norms = {}
    for i, (name, value) in enumerate(terms.items()):
        gradients = torch.autograd.grad(value, parameters, retain_graph=i < len(terms) - 1, allow_unused=True)
        present = [g for g in gradients if g is not None]
        norms[name] = torch.nn.utils.get_total_norm(present).item() if present else 0.0
    return norms


@contextlib.contextmanager
def _recomputing(student: Any) -> Iterator[None]:
    """Keep of each block its input alone: eager fp32 activations of a batch that fits compiled may not fit."""
    try:
        student.set_grad_checkpointing(True)
    except AssertionError:  # timm knows no way for this model
        yield
        return
    try:
        yield
    finally:
        student.set_grad_checkpointing(False)


def _gradients(step: DistillStep, call: object, inputs: StepInputs, scalars: StepScalars) -> dict[str, Tensor]:
    loss, _ = call(*inputs, *scalars)  # type: ignore[operator]
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}
    step.zero_grad(set_to_none=True)
    return gradients
