"""What each of two ranks does in the test of a layout chosen together: one model in parts, clocks that disagree."""

from types import SimpleNamespace
from unittest import mock

import torch
from block_attention import attend_by_blocks
from makers import build_model, large
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bdpo_pl.data.batches import pair_documents
from bdpo_pl.data.packing import RowLayout, lay_out
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.forward import prefix_sharing
from bdpo_pl.forward.prefix_sharing import choose_layout
from bdpo_pl.forward.reading import read
from bdpo_pl.forward.responses import response_logps

PAIRS = [PreferencePair([5 + n, 6, 7], [8, 9, 4], [10 + n, 4]) for n in range(4)]


def parts():
    model = large(build_model("llama"), 0.1).eval()
    for module in (*model.model.layers, model):
        fully_shard(module)
    return model


def choose(model, seconds, objects=False, room=None):
    """The layout chosen by a rank whose clock says that dense masks take `seconds`, and sparse ones a second.

    Args:
        model: split model.
        seconds: seconds of a pass with dense masks.
        objects: say that this rank finds fault with sparse attention.
        room: most pairs for whose backward pass there is memory.
    """
    now = [0.0]
    objection = prefix_sharing._objection

    def fault(model, documents, layout, *args, **kwargs):
        found = objection(model, documents, layout, *args, **kwargs)
        return "a fault" if objects and layout is RowLayout.ONE_ROW else found

    def reading(model, batch, documents, run):
        now[0] += 1.0 if model.config._attn_implementation == "flex_attention" else seconds
        if room is None or len(documents) <= room:
            return read(model, batch, documents, run)

        def no_memory(gradient):
            raise torch.OutOfMemoryError("CUDA out of memory")

        def keep(module, args, output):
            output.register_hook(no_memory)

        handle = model.model.layers[0].mlp.register_forward_hook(keep)
        try:
            return read(model, batch, documents, run)
        finally:
            handle.remove()

    with (
        mock.patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, flex_attention=attend_by_blocks),
        mock.patch.object(prefix_sharing, "_on_gpu", return_value=True),
        mock.patch.object(prefix_sharing, "_objection", fault),
        mock.patch.object(prefix_sharing, "read", reading),
        mock.patch.object(prefix_sharing, "time", SimpleNamespace(perf_counter=lambda: now[0])),
    ):
        return choose_layout(model, PairTable.from_pairs(PAIRS, [3, 8]))


def layouts_are_chosen_together(rank):
    """Each rank alone would choose otherwise, and then wait for parts of weights that nobody sends."""
    model = parts()
    assert choose(model, seconds=0.5 if rank == 0 else 1.0) is RowLayout.ONE_ROW
    model.set_attn_implementation("sdpa")
    assert choose(model, seconds=1.0, objects=rank == 1) is RowLayout.SHARED
    if not hasattr(model, "reset_iter_state"):
        return
    # After a backward pass without memory, the next one is as if there had been none.
    assert choose(model, seconds=0.5, room=2) is RowLayout.SHARED
    response_logps(model, lay_out(pair_documents(PAIRS), RowLayout.SHARED, 0)).sum().backward()
    assert all(isinstance(parameter.grad, DTensor) for parameter in model.parameters())
