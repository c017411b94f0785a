"""The environment of all tests, set before anything that reads it is imported."""

import gc
import os

# One thread a process: test processes share the cores already, and threads that spin while they wait take the cores
# from the others.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import pytest  # noqa: E402
import torch  # noqa: E402  (reads the variables above)

os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    # With no GPU the Triton kernels run in Triton's interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def seed_of_no_other_test():
    """Forget the seed that a command left in this process: data are split and drawn by it where it is there."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage():
    """Leave what is imported out of collections: looking through it takes over half a second, in every fit."""
    gc.freeze()


def pytest_unconfigure():
    """Let the interpreter clear up what was left out."""
    gc.unfreeze()
