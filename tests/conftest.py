"""What tests of several folders share."""

import pytest


@pytest.fixture(params=["cpu", "torch", "dali"])
def backend(request):
    """Each crop backend by name; DALI's is skipped where it is not installed."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="needs DALI: pip install nvidia-dali-cuda130")
    return request.param
