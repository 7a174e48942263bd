"""The direct call of cuSOLVER, against a library of the same functions that solves on the host."""

import ctypes

import numpy as np
import pytest
import torch

from benchmarks import cusolver
from benchmarks.synthetic import synthetic_tokens

KINDS = {0: np.float32, 1: np.float64}


class HostLibrary:
    """The functions of cuSOLVER that are called, on host memory, with the meaning of NVIDIA's header."""

    def __init__(self, version, fails=(), status=0):
        self.version, self.fails, self.status = version, fails, status
        self.workspace_was_zero = None

    def cusolverGetVersion(self, version):
        version._obj.value = self.version
        return 0

    def cusolverDnCreate(self, handle):
        handle._obj.value = 71
        return 0

    def cusolverDnCreateParams(self, parameters):
        parameters._obj.value = 72
        return 0

    def cusolverDnSetStream(self, handle, stream):
        return int((handle, stream) != (71, 5))

    def cusolverDnXsyevBatched_bufferSize(self, *arguments):
        *_, on_device, on_host, _ = arguments
        on_device._obj.value, on_host._obj.value = 4096, 128
        return 0

    def cusolverDnXsyevBatched(self, handle, parameters, mode, triangle, n, kind, a, lda, w_kind, w, *rest):
        compute_kind, device_buffer, device_bytes, _, host_bytes, info, batch = rest
        assert (handle, parameters, mode, triangle, device_bytes, host_bytes) == (71, 72, 1, 0, 4096, 128)
        assert kind == w_kind == compute_kind and lda == n
        matrices = view(a, KINDS[kind], (batch, n, n))
        values, vectors = np.linalg.eigh(matrices)
        matrices[:] = vectors.swapaxes(1, 2)  # column by column
        view(w, KINDS[kind], (batch, n))[:] = values
        view(info, np.int32, (batch,))[list(self.fails)] = 3
        self.workspace_was_zero = not view(device_buffer, np.uint8, (4096,)).any()
        return self.status


def view(address, kind, shape):
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), kind).reshape(shape)


@pytest.fixture
def host_library(monkeypatch):
    def install(library):
        cusolver._solver.cache_clear()
        monkeypatch.setattr(cusolver, "load_library", lambda: library)
        monkeypatch.setattr(cusolver, "_stream", lambda device: 5)
        return library

    yield install
    cusolver._solver.cache_clear()


def matrices_of(dtype):
    tokens = synthetic_tokens("typical", 3, 40, 64)
    return (tokens @ tokens.mT).to(dtype)


@pytest.mark.parametrize(("dtype", "roundoff"), [(torch.float32, 2.0**-24), (torch.float64, 2.0**-53)])
def test_values_ascend_and_vectors_are_columns(host_library, dtype, roundoff):
    host_library(HostLibrary(12004))
    matrices = matrices_of(dtype)
    before = matrices.clone()
    values, vectors = cusolver.batched_eigh(matrices)
    assert torch.equal(matrices, before)
    assert values.dtype == vectors.dtype == dtype
    assert bool((values.diff(dim=1) >= 0).all())
    residual = matrices @ vectors - vectors * values[:, None, :]
    # Backward stable: n u times the norm, which is at most 40 of 40 unit tokens.
    assert float(residual.norm(dim=(1, 2)).max()) <= 40 * roundoff * 40


def test_matrix_that_does_not_converge_is_nan_and_spares_its_neighbours(host_library):
    host_library(HostLibrary(12004, fails=(1,)))
    values, _ = cusolver.batched_eigh(matrices_of(torch.float32))
    assert values.isnan().all(dim=1).tolist() == [False, True, False]
    assert bool(values[[0, 2]].isfinite().all())


def test_workspace_is_zeroed_for_the_versions_that_read_it_first(host_library):
    library = host_library(HostLibrary(11701))
    cusolver.batched_eigh(matrices_of(torch.float32))
    assert library.workspace_was_zero is True


def test_refused_call_names_function_and_status(host_library):
    host_library(HostLibrary(12004, status=3))
    with pytest.raises(RuntimeError, match=r"cusolverDnXsyevBatched: cuSOLVER gave status 3.*backend='resolvent'"):
        cusolver.batched_eigh(matrices_of(torch.float32))


def test_library_that_came_with_torch_has_every_function():
    library = cusolver.load_library()
    if library is None:
        pytest.skip("no cuSOLVER on this machine")
    version = ctypes.c_int()
    assert library.cusolverGetVersion(ctypes.byref(version)) == 0
    assert version.value >= 11600
    for name, arguments in cusolver._SIGNATURES.items():
        assert list(getattr(library, name).argtypes) == list(arguments)
