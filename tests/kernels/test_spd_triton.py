"""The Triton kernels in the interpreter against float64, and compiled ahead of time for three GPUs."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.spd.poles import rational_log

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: its kernels are not tested", allow_module_level=True)

from benchmarks import compile_report

SCRIPT = Path(__file__).with_name("interpreted_kernels.py")
# Every variant of a kernel at n = 16, loss and gradient of one matrix at the larger sizes; the rest is slow.
QUICK = [("random", 16), ("duplicates", 16), ("duplicates", 49), ("random", 64), ("random", 100)]
SLOW = [
    ("rank_deficient", 49),
    ("near_degenerate", 49),
    ("ill_conditioned", 49),
    ("near_degenerate", 64),
    ("ill_conditioned", 64),
]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
HALF = 2.0**-11
"""Unit roundoff of fp16, of which the gradient's operands are: both inverses, the difference, and one product."""
SCALAR_TOLERANCE = 64 * 2.0**-24
"""The same loss summed with and without the gradient, or twice the same products."""


@pytest.fixture(scope="module")
def interpreted(spd_case, tmp_path_factory):
    """(kind, n) -> what the kernels gave; one interpreter process for the quick cases and one for the slow."""

    @functools.cache
    def run(cases):
        folder = tmp_path_factory.mktemp("interpreted")
        inputs = {}
        for kind, n in cases:
            case = spd_case(kind, n)
            crops = slice(0, crops_of(kind, n))
            inputs[f"{kind}-{n}"] = {
                "matrices": case.matrices[crops],
                "target": case.target[crops],
                "eps": case.eps,
                "all_variants": crops.stop == 2,
            }
        torch.save(inputs, folder / "inputs.pt")
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
        files = [str(folder / "inputs.pt"), str(folder / "outputs.pt")]
        command = [sys.executable, "-W", "ignore", str(SCRIPT), *files]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return torch.load(folder / "outputs.pt", weights_only=True)

    return lambda kind, n: run(tuple(QUICK if (kind, n) in QUICK else SLOW))


def crops_of(kind, n):
    """Both crops of the smallest and of the slow cases, one of the others."""
    return 2 if n == 16 or (kind, n) in SLOW else 1


def frobenius(difference):
    return float(difference.double().norm(dim=(-2, -1)).max())


@pytest.mark.parametrize("path", ["eigh", "spectral"])
@pytest.mark.parametrize(("kind", "n"), CASES)
def test_eigh_kernels_equal_float64(interpreted, spd_case, kind, n, path):
    case, found = spd_case(kind, n), interpreted(kind, n)[f"{kind}-{n}/{path}"]
    crops = crops_of(kind, n)
    if "log" in found:
        assert frobenius(found["log"] - case.logs[:crops]) <= case.rounding
    assert float((found["loss"] / n - case.losses[:crops]).abs().max()) <= case.loss_bound(case.rounding)
    assert frobenius(found["gradient"] / n - case.gradients[:crops]) <= case.gradient_bound(case.rounding)


@pytest.mark.parametrize(("kind", "n"), CASES)
def test_resolvent_kernels_equal_float64(interpreted, spd_case, rational_error, kind, n):
    case, found = spd_case(kind, n), interpreted(kind, n)[f"{kind}-{n}/resolvent"]
    crops = crops_of(kind, n)
    error = rational_error(case.eps, n)
    log_bound = n**0.5 * error.value + case.rounding
    rational = rational_log(case.eps, n)
    # sum_j rho_j |R_j|^2 |E| is what four roundings act on; |R_j| is at most 1 / (eps + t_j).
    weight = sum(r / (case.eps + t) ** 2 for t, r in zip(rational.poles, rational.residues, strict=True))
    half_bound = 4 * HALF * 2 / n * weight * case.distance
    gradient_bound = case.gradient_bound(log_bound) + 2 / n * error.slope * case.distance + half_bound
    if "log" in found:
        assert frobenius(found["log"] - case.logs[:crops]) <= log_bound
    assert float((found["loss"] / n - case.losses[:crops]).abs().max()) <= case.loss_bound(log_bound)
    assert frobenius(found["gradient"] / n - case.gradients[:crops]) <= gradient_bound
    # The bound above allows for the worst direction. Nothing of the kind happens to these tokens.
    relative = frobenius(found["gradient"] / n - case.gradients[:crops])
    relative /= frobenius(case.gradients[:crops])
    assert relative <= 0.01


@pytest.mark.parametrize("path", ["eigh", "resolvent", "spectral"])
@pytest.mark.parametrize(("kind", "n"), [case for case in CASES if case not in QUICK or case[1] == 16])
def test_kernel_variants_agree_among_themselves(interpreted, kind, n, path):
    found = interpreted(kind, n)[f"{kind}-{n}/{path}"]
    assert float((found["loss_alone"] / found["loss"] - 1).abs().max()) <= SCALAR_TOLERANCE
    asymmetry = frobenius(found["log"] - found["log"].mT)
    assert asymmetry <= SCALAR_TOLERANCE * frobenius(found["log"])
    if "pullback" in found:
        scale = frobenius(found["gradient"])
        # Through the logarithm's own backward: the same operands, rounded at another scale.
        assert frobenius(found["pullback"] - found["gradient"]) <= 4 * HALF * scale


@pytest.mark.parametrize("backend", ["eigh", "resolvent"])
def test_bad_and_indefinite_matrices_give_nan_and_spare_their_neighbours(interpreted, backend):
    found = interpreted(*QUICK[0])[f"bad/{backend}"]
    assert found["loss"].isnan().tolist() == [False, True, True]
    assert bool(found["gradient"][0].isfinite().all())
    assert bool(found["gradient"][1:].isnan().any(dim=-1).any(dim=-1).all())


def test_three_products_on_tensor_cores_are_as_good_as_fp32(interpreted):
    found = interpreted(*QUICK[0])["products"]
    bias, worst = {}, {}
    for name in ("rounded", "cut", "plain"):
        error = (found[name].double() / found["exact"] - 1) * 2.0**24  # all terms are positive: relative to their sum
        bias[name], worst[name] = abs(float(error.mean())), float(error.abs().max())
    # fp32 with 32 roundings in a row is within 32; halves rounded to nearest leave out 4 at most, of either sign,
    # and 1,024 entries average it away. One product alone loses 13 bits: that is what is being corrected.
    assert worst["rounded"] <= 8 and bias["rounded"] <= 0.5
    assert worst["cut"] <= 16 and 1 < bias["cut"] <= 8
    assert worst["plain"] > 2**10


@pytest.mark.parametrize("target", compile_report.TARGETS)
def test_no_kernel_spills_a_register(target, record_property):
    spilling = {}
    for variant in compile_report.variants():
        used = compile_report.compile_variant(variant, target)
        record_property(variant.name, f"{used.registers} registers, {used.shared_bytes} B shared")
        assert 0 < used.registers <= 255
        assert used.shared_bytes <= 99 * 1024  # what sm_80's smaller sibling, sm_86, has
        if used.stack_bytes:
            spilling[variant.name] = used.stack_bytes
    assert spilling == {}
