#!/bin/sh
# Runs the SPD kernels under compute-sanitizer: out-of-bounds accesses, then races through shared memory.
# Needs a CUDA device and NVIDIA's compute-sanitizer (CUDA toolkit). Run from the repository root.
set -eu

PY="${PY:-.venv/bin/python}"
if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not on the PATH. Install the CUDA toolkit or add its bin folder to PATH." >&2
    exit 2
fi

PROGRAM='
import torch
from kernels.spd import token_spd
from kernels.spd.loss import log_loss_op, logm_backward_op, logm_op
for n in (1, 16, 49, 64, 65, 196, 256):
    matrices = token_spd(torch.randn(2, n, 96, device="cuda"))
    target = torch.zeros_like(matrices)
    for backend in ("eigh", "resolvent"):
        log_loss_op(matrices, target, 1.0, backend, True)
        log_loss_op(matrices, target, 1.0, backend, False)
        logm_op(matrices, 1.0, backend)
        logm_backward_op(matrices, target, 1.0, backend)
torch.cuda.synchronize()
'

# Without the caching allocator each tensor is an allocation of its own, so that memcheck sees its bounds.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck synccheck initcheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-regex kns=kernel "$PY" -c "$PROGRAM"
done
