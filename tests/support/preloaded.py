"""What the processes of the tests begin with: imported once, by the server that they are forked from."""

# ruff: noqa: E402 - no garbage is looked for while it imports
import atexit
import gc

gc.disable()

import datasets  # noqa: F401
import lightning  # noqa: F401
import logged_values
import peft  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import bdpo_pl.cli.main
import bdpo_pl.parallel.fsdp2
import bdpo_pl.training.datamodule
import bdpo_pl.training.module  # noqa: F401

logged_values.stay()

# Nothing of it is garbage, here or in the processes: looking through it takes over half a second each time.
gc.freeze()
gc.enable()
atexit.register(gc.unfreeze)
