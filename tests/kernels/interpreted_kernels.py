"""Runs the Triton kernels in the interpreter on saved matrices and saves what they give.

Products read the operands as tensor cores do: the 10 leading mantissa bits of fp32.

A process of its own, because Triton decides at import whether it interprets:
`TRITON_INTERPRET=1 python interpreted_kernels.py inputs.pt outputs.pt`.
"""

import sys

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from kernels.spd.device import fused
from kernels.spd.eigh import batched_eigh
from kernels.spd.loss import log_loss_op, logm_backward_op, logm_op
from kernels.spd.triton_math import dot_fp32, dot_fp32_cut
from kernels.spd.triton_spectral import log_map, spectral_gradient


def run_path(path, matrices, target, eps, all_variants):
    """The logarithm, the loss and its gradient by one path; the other variants of its kernels on demand."""
    if path == "spectral":
        values, vectors = batched_eigh(matrices)
        distance, upstream = log_map(values, vectors, target, write=True)
        return {
            "loss": distance,
            "gradient": spectral_gradient(values, vectors, upstream),
            "loss_alone": log_map(values, vectors, target, write=False)[0],
            "log": log_map(values, vectors, None, write=True)[1],
        }
    loss, gradient = log_loss_op(matrices, target, eps, path, True)
    found = {"loss": loss, "gradient": gradient}
    if all_variants:
        log = logm_op(matrices, eps, path)
        found["log"] = log
        found["loss_alone"] = log_loss_op(matrices, target, eps, path, False)[0]
        # Of a gradient of another scale, as one that comes from a small loss weight.
        found["pullback"] = 2**20 * logm_backward_op(matrices, 2.0**-19 * (log - target), eps, path)
    return found


def read_fp32_as_tf32():
    """The interpreter multiplies fp32 in full; an NVIDIA tensor core ignores the 13 last bits of an operand."""
    plain = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        for operand in (a, b):
            if operand.data.dtype == np.float32:
                operand.data = (np.ascontiguousarray(operand.data).view(np.int32) & -8192).view(np.float32)
        return plain(self, a, b, *rest)

    InterpreterBuilder.create_dot = create_dot


@triton.jit
def dot_kernel(left, right, rounded, cut, plain):
    at = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    a = tl.load(left + at)
    b = tl.load(right + at)
    tl.store(rounded + at, dot_fp32(a, b))
    tl.store(cut + at, dot_fp32_cut(a, b))
    tl.store(plain + at, tl.dot(a, b, input_precision="tf32"))


def run_products():
    """32 x 32 products of positive numbers, where errors of one sign add up."""
    left, right = torch.rand(2, 32, 32, generator=torch.Generator().manual_seed(0))
    found = {name: torch.empty(32, 32) for name in ("rounded", "cut", "plain")}
    dot_kernel[(1,)](left, right, *found.values())
    return found | {"exact": left.double() @ right.double()}


def main(inputs, outputs):
    assert fused(torch.empty(1, 1, 1))
    read_fp32_as_tf32()
    results = {"products": run_products()}
    for name, case in torch.load(inputs, weights_only=True).items():
        for path in ("eigh", "resolvent", "spectral"):
            results[f"{name}/{path}"] = run_path(path, **case)
    bad = torch.stack([torch.eye(20), torch.eye(20), torch.eye(20)])
    bad[1, 3, 3] = float("nan")
    bad[2, 4, 4] = -3.0
    for backend in ("eigh", "resolvent"):
        loss, gradient = log_loss_op(bad, torch.zeros(3, 20, 20), 1.0, backend, True)
        results[f"bad/{backend}"] = {"loss": loss, "gradient": gradient}
    torch.save(results, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
