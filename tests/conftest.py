"""What tests of several folders share."""

import resource
import signal
import subprocess

import pytest

# A shell that starts the suite in the background has it ignore SIGINT, and every process it starts inherits that:
# Ctrl-C could not be tested.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=["cpu", "torch", "dali"])
def backend(request):
    """Each crop backend by name; DALI's is skipped where it is not installed."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="needs DALI: pip install nvidia-dali-cuda130")
    return request.param


@pytest.fixture
def small_disk(tmp_path):
    """A function: a new folder on a file system of so many bytes; where none may be mounted, files are limited."""
    mounted, limits = [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def make(size):
        place = tmp_path / f"small{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        try:
            subprocess.run(command, capture_output=True, check=True)
            mounted.append(place)
        except (FileNotFoundError, subprocess.CalledProcessError):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
        return place

    yield make
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for place in mounted:
        # Lazily: the tracebacks of the errors caught may still hold files of it.
        subprocess.run(["umount", "--lazy", str(place)], check=True)
