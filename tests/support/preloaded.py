"""What the processes of the tests begin with: imported once, by the server that they are forked from."""

import atexit
import gc

import datasets  # noqa: F401
import lightning  # noqa: F401
import peft  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import bdpo_pl.cli.main
import bdpo_pl.parallel.fsdp2
import bdpo_pl.training.datamodule
import bdpo_pl.training.module  # noqa: F401

# Nothing of it is garbage in the processes: looking through it takes over half a second each time.
gc.freeze()
atexit.register(gc.unfreeze)
