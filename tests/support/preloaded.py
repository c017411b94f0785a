"""What the processes of the tests begin with: imported once, by the server that they are forked from."""

# ruff: noqa: E402 - no garbage is looked for while it imports
import atexit
import contextlib
import gc

gc.disable()

import datasets  # noqa: F401
import lightning  # noqa: F401
import logged_values
import peft  # noqa: F401
import pytest  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401
import without_waiting

import bdpo_pl.cli.main
import bdpo_pl.parallel.fsdp2
import bdpo_pl.training.datamodule
import bdpo_pl.training.module  # noqa: F401

with contextlib.suppress(ImportError):
    import s3fs  # noqa: F401  (Lightning imports it where it is installed, to ask whether a folder is in a bucket)

logged_values.stay()
without_waiting.sync()

# Nothing of it is garbage, here or in the processes: looking through it takes over half a second each time.
gc.freeze()
gc.enable()
atexit.register(gc.unfreeze)
