"""The SPD kernels on the hardware: against float64, repeatable, without waiting for the host, in a graph."""

import math

import pytest
import torch

from benchmarks import cusolver
from benchmarks.synthetic import REGIMES, synthetic_tokens
from kernels.spd import log_euclidean_loss, reduce_tokens, spd_logm, token_spd
from kernels.spd.device import MIN_CAPABILITY, fused
from kernels.spd.eigh import JACOBI_LIMIT
from kernels.spd.loss import log_loss_op
from kernels.spd.matrices import MAX_TOKENS
from kernels.spd.poles import rational_log
from kernels.spd.reference import reference_logm, reference_loss_and_gradient

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = (1, 7, 16, 36, 49, 64, 65, 128, 196, 256)
UNIT_ROUNDOFF = 2.0**-24
HALF = 2.0**-11
both = pytest.mark.parametrize("backend", ["eigh", "resolvent"])


def batch(regime, n, crops=3):
    """fp32 student matrices and teacher logarithms, on the CPU."""
    student = token_spd(synthetic_tokens(regime, crops, n, 96, seed=n).float())
    teacher = token_spd(synthetic_tokens("typical", crops, n, 128, seed=n + 1))
    return student, torch.stack([reference_logm(matrix) for matrix in teacher]).float()


def frobenius(difference):
    return float(difference.double().norm(dim=(-2, -1)).max())


@both
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("n", SIZES)
def test_hardware_equals_float64(backend, regime, n):
    matrices, target = batch(regime, n)
    exact = [reference_loss_and_gradient(a, t) for a, t in zip(matrices, target, strict=True)]
    logs = torch.stack([reference_logm(matrix) for matrix in matrices])
    gradients = torch.stack([gradient for _, gradient in exact])
    losses = torch.tensor([loss for loss, _ in exact], dtype=torch.float64)
    distance = float((logs - target).norm(dim=(-2, -1)).max())

    loss, gradient = log_loss_op(matrices.cuda(), target.cuda(), 1.0, backend, True)
    log = spd_logm(matrices.cuda(), backend=backend).cpu()

    # As on the CPU: n u kappa for a backward stable method (tests/kernels/conftest.py), and what f adds to it.
    bound = UNIT_ROUNDOFF * (n * (n + 1) + 8 * float(logs.norm()))
    slope = half = 0.0
    if backend == "resolvent":
        rational = rational_log(1.0, n)
        bound += math.sqrt(n) * rational.error
        x = torch.logspace(math.log10(rational.lower), math.log10(rational.upper), 4001, dtype=torch.float64)
        terms = list(zip(rational.poles, rational.residues, strict=True))
        slope = float((sum(r / (x + t) ** 2 for t, r in terms) - 1 / x).abs().max())
        half = 4 * HALF * sum(r / (1 + t) ** 2 for t, r in terms)  # four roundings to fp16
    assert frobenius(log - logs) <= bound
    assert float((loss.cpu() / n - losses).abs().max()) <= (2 * distance * bound + bound**2) / n + 1e-6
    gradient_bound = 2 / n * (bound * (1 + distance) + (slope + half) * distance)
    assert frobenius(gradient.cpu() / n - gradients) <= gradient_bound


@both
@pytest.mark.parametrize("n", [49, 64, 196, 256])
def test_two_runs_are_equal_to_the_bit(backend, n):
    matrices, target = (tensor.cuda() for tensor in batch("typical", n, crops=32))
    first = log_loss_op(matrices, target, 1.0, backend, True)
    second = log_loss_op(matrices, target, 1.0, backend, True)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("n", [49, 196])
def test_resolvent_does_not_wait_for_the_host(n):
    tokens = torch.randn(8, n, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(8, n, 1024, device="cuda", dtype=torch.bfloat16)

    def step():
        with torch.no_grad():
            target = spd_logm(token_spd(teacher), backend="resolvent")
        log_euclidean_loss(tokens, target, backend="resolvent").backward()

    step()  # compiles
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(tokens.grad.isfinite().all())


@pytest.mark.parametrize(("backend", "n"), [("resolvent", 49), ("resolvent", 196), ("eigh", 64)])
def test_captured_graph_replays_on_new_tokens(backend, n):
    """The resolvent at any n, and the one-launch eigendecomposition."""
    matrices, target = (tensor.cuda() for tensor in batch("typical", n))
    other, other_target = (tensor.cuda() for tensor in batch("flat", n))
    expected = log_loss_op(other, other_target, 1.0, backend, True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        log_loss_op(matrices, target, 1.0, backend, True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = log_loss_op(matrices, target, 1.0, backend, True)
    matrices.copy_(other)
    target.copy_(other_target)
    graph.replay()
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize("method", ["pool", "sample"])
def test_whole_loss_and_its_gradient_in_a_captured_graph(method):
    """From the tokens of a 28 x 28 grid to their gradient: nothing on the way waits for the host."""
    tokens = torch.randn(4, 784, 64, device="cuda", requires_grad=True)
    teacher = torch.randn(4, 784, 96, device="cuda")

    def step():
        with torch.no_grad():
            target = spd_logm(token_spd(reduce_tokens(teacher, (28, 28), method)), backend="resolvent")
        loss = log_euclidean_loss(reduce_tokens(tokens, (28, 28), method), target, backend="resolvent")
        return loss.detach(), *torch.autograd.grad(loss, tokens)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        tokens.copy_(torch.randn_like(tokens))
    graph.replay()
    expected = step()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [33, 49, 196, 256])
def test_cusolver_called_directly_diagonalises(dtype, n):
    if cusolver.load_library() is None:
        pytest.skip("this cuSOLVER has no batched solver")
    matrices = batch("near_duplicates", n)[0].to("cuda", dtype)
    values, vectors = cusolver.batched_eigh(matrices)
    roundoff = UNIT_ROUNDOFF if dtype == torch.float32 else 2.0**-53
    bound = n * roundoff * (n + 1)  # backward stable: n u times the norm
    assert bool((values.diff(dim=1) >= 0).all())
    assert frobenius(matrices @ vectors - vectors * values[:, None, :]) <= bound
    assert frobenius(vectors.mT @ vectors - torch.eye(n, device="cuda", dtype=dtype)) <= n * n**0.5 * roundoff
    assert float((values.cpu().double() - torch.linalg.eigvalsh(matrices.cpu().double())).abs().max()) <= bound


@both
@pytest.mark.parametrize("n", [49, 196])
def test_bad_token_spares_the_other_crops(backend, n):
    tokens = torch.randn(4, n, 64, device="cuda")
    target = spd_logm(token_spd(torch.randn(4, n, 96, device="cuda")), backend=backend)
    clean = log_euclidean_loss(tokens, target, backend=backend, reduction="none")
    tokens[2, 5, 7] = float("nan")
    losses = log_euclidean_loss(tokens, target, backend=backend, reduction="none")
    assert losses.isnan().tolist() == [False, False, True, False]
    kept = torch.tensor([0, 1, 3])
    assert torch.allclose(losses.cpu()[kept], clean.cpu()[kept], rtol=64 * UNIT_ROUNDOFF, atol=0)


@both
def test_compiled_step_under_bf16_autocast_equals_eager(backend):
    student = torch.randn(8, 196, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(8, 196, 1024, device="cuda", dtype=torch.bfloat16)

    def step(student, teacher):
        with torch.no_grad():
            target = spd_logm(token_spd(teacher), backend=backend)
        return log_euclidean_loss(student, target, backend=backend)

    eager = step(student, teacher)
    eager.backward()
    expected, student.grad = student.grad.clone(), None
    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = compiled(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(float(loss.detach() / eager.detach()) - 1) <= 1e-4  # Inductor's order of sums in the Gram matrix
    difference = (student.grad.float() - expected.float()).norm() / expected.float().norm()
    assert float(difference) <= 2.0**-6  # both gradients are bf16; dA X too, under autocast


def test_fused_kernels_are_what_runs_here():
    """Otherwise the tests above compared torch with torch."""
    matrices = torch.eye(64, device="cuda")[None]
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        pytest.skip("the fused kernels need compute capability 8.0")
    assert fused(matrices, MAX_TOKENS)
    assert fused(matrices, JACOBI_LIMIT)
    assert fused(matrices)
