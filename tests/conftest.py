"""The environment of all tests, set before anything that reads it is imported."""

import atexit
import gc
import os
import sys

# One thread a process: test processes share the cores already, and threads that spin while they wait take the cores
# from the others.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# What is imported is no garbage: to look through it again and again takes a tenth of the imports.
gc.disable()
# What is left out of collections is cleared up at the end.
atexit.register(gc.unfreeze)

import pytest  # noqa: E402
import without_waiting  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"
without_waiting.sync()
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
# What starts the workers runs no test, and they wait for what it imports.
if IS_WORKER or "-n" not in sys.argv:
    import torch  # reads the variables above

    if not torch.cuda.is_available():
        # With no GPU the Triton kernels run in Triton's interpreter.
        os.environ["TRITON_INTERPRET"] = "1"
# From Python 3.14 on, servers of processes have keys.
if IS_WORKER and sys.version_info < (3, 14):
    import preloaded  # noqa: F401
    from children import fork_server

    gc.disable()
    fork_server()


LONG = (
    "test_fsdp2.py", "test_examples.py", "test_compiled.py", "test_jobs.py", "test_fit.py", "test_memory_plan.py",
    "test_cpu_offload.py", "test_linear.py", "test_module.py", "test_cell.py", "test_checkpoints.py",
    "test_training_options.py", "test_safety_probe.py", "test_diagnose.py", "test_planned_host.py",
    "test_evaluate_servers.py", "test_evaluate.py", "test_flex_attention.py", "test_ranks.py", "test_completions.py",
    "test_stopping.py", "test_adapters.py",
)  # fmt: skip
"""Files that take longest, in this order: begun first, so that no process waits for another at the end."""


def pytest_collection_modifyitems(items):
    """Put the files that take longest first; all others stay as they are."""
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish():
    # Frozen first: the first collection would look through all that was imported.
    gc.freeze()
    gc.enable()
    if "lightning.pytorch" in sys.modules:
        # Here, because its import takes seconds that not all tests need.
        import logged_values

        logged_values.stay()


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


@pytest.fixture
def fewer_pairs(tmp_path, monkeypatch):
    """The embedded set of this process has every sixth of its pairs; see the module of that name."""
    import fewer_pairs

    from bdpo_pl import embedded

    for name in ("TRAIN_FILE", "HELD_OUT_FILE"):
        monkeypatch.setattr(embedded, name, getattr(embedded, name))  # puts it back
    fewer_pairs.take(tmp_path / "fewer pairs")
    return fewer_pairs
