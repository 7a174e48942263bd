"""Compiles the Triton kernels ahead of time, without a GPU, and reads what each one needs of an SM.

`python -m benchmarks.compile_report` prints the table for sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.spd import triton_jacobi, triton_resolvent, triton_spectral

TARGETS = (80, 90, 100)


@dataclass(frozen=True)
class Variant:
    """One kernel with the constants that the launches give it."""

    name: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Resources:
    """What the assembler says of one compiled kernel; bytes and 32-bit registers a thread, shared a program."""

    registers: int
    stack_bytes: int
    """Spilled registers live here: 0 means that nothing is spilled."""
    shared_bytes: int


def _variant(
    name: str, kernel: Any, pointers: dict[str, str], scalars: dict[str, Any], constants: dict[str, Any],
    options: dict[str, int],
) -> Variant:  # fmt: skip
    signature: dict[str, Any] = {pointer: f"*{dtype}" for pointer, dtype in pointers.items()}
    return Variant(name, kernel, signature | scalars | dict.fromkeys(constants, "constexpr"), constants, options)


def _resolvent_variants(num_poles: int) -> Iterator[Variant]:
    weights = ("fp32",) * num_poles
    constants = {"NUM_POLES": num_poles, "TILE": triton_resolvent.RESOLVENT_TILE}
    yield _variant(
        f"resolvent, {num_poles} poles", triton_resolvent.resolvent_kernel,
        dict.fromkeys(("matrices", "work", "panels"), "fp32"),
        {"poles": weights, "n": "i32", "num_tiles": "i32"}, constants, triton_resolvent.RESOLVENT_OPTIONS,
    )  # fmt: skip
    pointers = dict.fromkeys(("work", "target", "log", "partials"), "fp32")
    pointers |= {"upstream": "fp16", "operands": "fp16"}
    scalars = {"residues": weights, "constant": "fp32", "n": "i32", "num_tiles": "i32", "padded": "i32"}
    for form, target, log, operands in (
        ("loss and gradient", True, False, True),
        ("loss", True, False, False),
        ("logarithm", False, True, False),
        ("pullback", False, False, True),
    ):
        flags = {"HAS_TARGET": target, "WRITE_LOG": log, "WRITE_OPERANDS": operands}
        yield _variant(
            f"combine, {num_poles} poles, {form}", triton_resolvent.combine_kernel,
            pointers, scalars, constants | flags, triton_resolvent.COMBINE_OPTIONS,
        )  # fmt: skip


def _jacobi_variants(size: int) -> Iterator[Variant]:
    pointers = dict.fromkeys(("matrices", "given", "loss", "out", "scratch"), "fp32")
    constants = {
        "SIZE": size,
        "MAX_SWEEPS": triton_jacobi.JACOBI_SWEEPS,
        "CONVERGED": triton_jacobi.JACOBI_CONVERGED,
        "USABLE": triton_jacobi.JACOBI_USABLE,
    }
    for form, target, gradient, pullback in (
        ("loss and gradient", True, True, False),
        ("loss", True, False, False),
        ("logarithm", False, False, False),
        ("pullback", False, False, True),
    ):
        flags = {"HAS_TARGET": target, "WITH_GRADIENT": gradient, "PULLBACK": pullback}
        yield _variant(
            f"jacobi {size}, {form}", triton_jacobi.jacobi_kernel,
            pointers, {"n": "i32"}, constants | flags, triton_jacobi.jacobi_options(size),
        )  # fmt: skip


def _spectral_variants() -> Iterator[Variant]:
    tiles = {"TILE": triton_spectral.SPECTRAL_TILE, "DEPTH": triton_spectral.SPECTRAL_DEPTH}
    pointers = dict.fromkeys(("vectors", "eigenvalues", "target", "out", "partials"), "fp32")
    n, options = {"n": "i32"}, triton_spectral.SPECTRAL_OPTIONS
    for form, target, write in (("loss and gradient", True, True), ("loss", True, False), ("log", False, True)):
        constants = tiles | {"HAS_TARGET": target, "WRITE": write}
        yield _variant(f"log map, {form}", triton_spectral.log_map_kernel, pointers, n, constants, options)
    pointers = dict.fromkeys(("vectors", "product", "eigenvalues", "out"), "fp32")
    yield _variant("loewner", triton_spectral.loewner_kernel, pointers, n, tiles, options)


def variants() -> list[Variant]:
    """All kernels in all the forms that are launched (poles: the counts for eps = 1 and for small eps)."""
    resolvent = [variant for num_poles in (4, 5, 8) for variant in _resolvent_variants(num_poles)]
    jacobi = [variant for size in (16, 32, 64) for variant in _jacobi_variants(size)]
    return [*resolvent, *jacobi, *_spectral_variants()]


def compile_variant(variant: Variant, target: int) -> Resources:
    """Compiles for sm_`target` with the assembler that ships with Triton (Triton caches the result)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # As the launches specialise: tensors and the padded width are multiples of 16, n is any number.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, dtype) in enumerate(variant.signature.items())
        if name == "padded" or str(dtype).startswith("*")
    }
    source = ASTSource(fn=variant.kernel, signature=variant.signature, constexprs=variant.constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=variant.options)
    usage = _cubin_usage(compiled.asm["cubin"])
    return Resources(usage["REG"], usage["STACK"], int(compiled.metadata.shared))


def _cubin_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def main() -> None:
    """Print one line a kernel and target."""
    print(f"{'kernel':38} {'target':>7} {'warps':>5} {'registers':>9} {'stack B':>8} {'shared B':>8}")
    for variant in variants():
        for target in TARGETS:
            used = compile_variant(variant, target)
            print(
                f"{variant.name:38} sm_{target:<4} {variant.options['num_warps']:5} {used.registers:9} "
                f"{used.stack_bytes:8} {used.shared_bytes:8}"
            )


if __name__ == "__main__":
    main()
