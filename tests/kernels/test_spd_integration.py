"""The loss inside compiled steps, under autocast, with bad numbers, and with wrong arguments."""

import pytest
import torch

from kernels.spd import log_euclidean_loss, spd_logm, token_spd
from kernels.spd.loss import log_loss_op, logm_backward_op, logm_op

both = pytest.mark.parametrize("backend", ["eigh", "resolvent"])

COMPILED_TOLERANCE = 64 * 2.0**-24
"""aot_eager runs the same operations; Inductor may sum in another order, and 1 / sqrt differs in the last bit.
Relative to the gradient's norm, at a condition number below 40 and n = 36."""
AUTOCAST_BACKWARD_TOLERANCE = 2.0**-7
"""Compiled under an outer autocast, the backward product dA X runs on bf16 operands: 2^-9 each, and the result."""


def tokens_for(n=36, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n)
    student = torch.randn(3, n, 32, generator=generator, dtype=torch.float32).to(dtype)
    teacher = torch.randn(3, n, 48, generator=generator, dtype=torch.float32).to(dtype)
    return student.requires_grad_(), teacher


def step_for(backend):
    def step(student, teacher):
        with torch.no_grad():
            target = spd_logm(token_spd(teacher), backend=backend)
        return log_euclidean_loss(student, target, backend=backend)

    return step


def loss_and_gradient(step, student, teacher, autocast=False):
    student.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = step(student, teacher)
    loss.backward()
    return loss.detach(), student.grad.clone()


def relative(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@both
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_step_without_graph_breaks_equals_eager(backend, compiler, autocast):
    torch._dynamo.reset()
    step = step_for(backend)
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=compiler)
    student, teacher = tokens_for()
    loss, gradient = loss_and_gradient(step, student, teacher)
    compiled_loss, compiled_gradient = loss_and_gradient(compiled, student, teacher, autocast)
    assert compiled_loss.dtype == torch.float32
    assert relative(compiled_loss, loss) <= COMPILED_TOLERANCE
    bound = AUTOCAST_BACKWARD_TOLERANCE if autocast else COMPILED_TOLERANCE
    assert relative(compiled_gradient, gradient) <= bound


@both
def test_second_step_does_not_recompile(backend):
    torch._dynamo.reset()
    compiled = torch.compile(step_for(backend), fullgraph=True, dynamic=False, backend="aot_eager")
    student, teacher = tokens_for()
    loss_and_gradient(compiled, student, teacher)
    with torch._dynamo.config.patch(error_on_recompile=True):
        other = student.detach().flip(0).requires_grad_()
        loss, _ = loss_and_gradient(compiled, other, teacher.flip(0))
    expected, _ = loss_and_gradient(step_for(backend), student, teacher)
    assert relative(loss, expected) <= COMPILED_TOLERANCE


@both
def test_one_compiled_step_takes_a_sweep_over_eps_and_n(backend):
    torch._dynamo.reset()

    def step(student, teacher, eps):
        with torch.no_grad():
            target = spd_logm(token_spd(teacher, eps=eps), eps=eps, backend=backend)
        return log_euclidean_loss(student, target, eps=eps, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n, eps in ((9, 1.0), (9, 0.3), (9, 0.1), (12, 0.1)):
        student, teacher = tokens_for(n)
        expected = step(student, teacher, eps)
        assert relative(compiled(student, teacher, eps), expected) <= COMPILED_TOLERANCE / eps


@both
def test_autocast_in_eager_changes_nothing(backend):
    step = step_for(backend)
    plain = loss_and_gradient(step, *tokens_for())
    inside = loss_and_gradient(step, *tokens_for(), autocast=True)
    assert torch.equal(plain[0], inside[0])
    assert torch.equal(plain[1], inside[1])


@both
def test_bfloat16_tokens_give_an_fp32_loss_and_a_bfloat16_gradient(backend):
    student, teacher = tokens_for(dtype=torch.bfloat16)
    loss, gradient = loss_and_gradient(step_for(backend), student, teacher)
    exact_student = student.detach().float().requires_grad_()
    exact_loss, exact_gradient = loss_and_gradient(step_for(backend), exact_student, teacher.float())
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert torch.equal(loss, exact_loss)
    assert relative(gradient, exact_gradient) <= 2.0**-8  # the cast of the gradient to bf16, nothing else


@both
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_matmul_precision_of_the_run_is_not_used(backend, precision):
    student, _ = tokens_for(64)
    matrices = token_spd(student.detach())
    target = torch.zeros_like(matrices)
    before = torch.get_float32_matmul_precision()
    expected = log_loss_op(matrices, target, 1.0, backend, True)
    try:
        torch.set_float32_matmul_precision(precision)
        found = log_loss_op(matrices, target, 1.0, backend, True)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


# opcheck looks at .grad of a tensor that it made itself.
own_access = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@both
@own_access
@pytest.mark.parametrize("with_grad", [True, False])
def test_opcheck_of_the_loss(backend, with_grad):
    matrices = token_spd(tokens_for(9)[0].detach()).requires_grad_(with_grad)
    target = torch.zeros(3, 9, 9)
    torch.library.opcheck(log_loss_op, (matrices, target, 1.0, backend, with_grad))


@both
@own_access
def test_opcheck_of_the_logarithm_and_its_backward(backend):
    matrices = token_spd(tokens_for(9)[0].detach()).requires_grad_()
    torch.library.opcheck(logm_op, (matrices, 1.0, backend))
    torch.library.opcheck(logm_backward_op, (matrices.detach(), torch.ones(3, 9, 9), 1.0, backend))


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("compiled", [False, True])
def test_bad_token_gives_a_nan_loss_and_never_an_exception(backend, bad, compiled):
    torch._dynamo.reset()

    def each(student, target):
        return log_euclidean_loss(student, target, backend=backend, reduction="none")

    function = torch.compile(each, fullgraph=True, backend="aot_eager") if compiled else each
    student, teacher = tokens_for(9)
    target = spd_logm(token_spd(teacher), backend=backend)
    clean = each(student, target).detach()
    with torch.no_grad():
        student[1, 4, 2] = bad
    losses = function(student, target)
    losses.sum().backward()
    assert bool(losses[1].isnan())
    # Another batch partner may take LAPACK through other blocks, not through other numbers.
    assert relative(losses[[0, 2]], clean[[0, 2]]) <= COMPILED_TOLERANCE
    assert bool(student.grad[1].isnan().any())
    assert bool(student.grad[[0, 2]].isfinite().all())
    assert bool(log_euclidean_loss(student, target, backend=backend).isnan())


@both
def test_bad_teacher_log_gives_a_nan_loss(backend):
    student, teacher = tokens_for(9)
    target = spd_logm(token_spd(teacher), backend=backend)
    target[2, 0, 0] = float("nan")
    losses = log_euclidean_loss(student, target, backend=backend, reduction="none")
    assert losses.isnan().tolist() == [False, False, True]


@both
def test_indefinite_matrix_gives_nan(backend):
    matrices = torch.diag_embed(torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, -4.0]]))
    finite = spd_logm(matrices, backend=backend).isfinite().all(dim=-1).all(dim=-1)
    assert finite.tolist() == [True, False]


def test_solver_that_does_not_converge_gives_nan_and_says_so(monkeypatch, caplog):
    def fail(matrices):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr("kernels.spd.eigh.batched_eigh", fail)
    loss, gradient = log_loss_op(torch.eye(4)[None], torch.zeros(1, 4, 4), 1.0, "eigh", True)
    assert bool(loss.isnan().all()) and bool(gradient.isnan().all())
    assert "their loss is NaN" in caplog.text


@both
def test_second_derivative_is_refused(backend):
    student, teacher = tokens_for(9)
    target = spd_logm(token_spd(teacher), backend=backend)
    for value in (
        log_euclidean_loss(student, target, backend=backend),
        spd_logm(token_spd(student), backend=backend).square().sum(),
    ):
        (gradient,) = torch.autograd.grad(value, student, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            gradient.sum().backward()


def test_teacher_that_asks_for_a_gradient_is_refused():
    student, teacher = tokens_for(9)
    target = spd_logm(token_spd(teacher)).requires_grad_()
    with pytest.raises(ValueError, match=r"teacher_log: it requires a gradient, and the teacher is frozen"):
        log_euclidean_loss(student, target)


def test_wrong_arguments_are_named():
    student, teacher = tokens_for(9)
    target = spd_logm(token_spd(teacher))
    with pytest.raises(ValueError, match=r"teacher_log: \[2, 9, 9\] against student matrices \[3, 9, 9\]"):
        log_euclidean_loss(student, target[:2])
    with pytest.raises(ValueError, match=r"backend: one of auto, eigh, resolvent is needed, got 'svd'"):
        log_euclidean_loss(student, target, backend="svd")
    with pytest.raises(ValueError, match=r"reduction: 'mean' or 'none' is needed, got 'sum'"):
        log_euclidean_loss(student, target, reduction="sum")
    with pytest.raises(ValueError, match=r"matrices: floating point \[batch, n, n\] is needed"):
        spd_logm(torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match=r"got torch\.int64 \[3, 4, 4\]"):
        spd_logm(torch.zeros(3, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"eps: .* got 0"):
        spd_logm(target, eps=0)
