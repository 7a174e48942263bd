"""What tests of several folders share."""

import signal

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
