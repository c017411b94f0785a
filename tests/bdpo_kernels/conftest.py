"""Both backends under the same tests: Triton compiled where there is a CUDA device, in its interpreter elsewhere."""

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    # The kernels read it when they are first used, not when bdpo_kernels is imported.
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        from interpreter import look_up_once

        look_up_once()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture
def device():
    return torch.device(DEVICE)


@pytest.fixture
def on_device(device):
    """What a test makes without naming a device is on `device`, where alone Triton's kernels run."""
    if device.type == "cpu":
        yield
        return
    with device:
        yield


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
