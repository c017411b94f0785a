"""Prefix sharing: whether a model may read a pair as one row, found out before it is relied on.

Nothing is taken for granted: the model scores a few real pairs with the responses in rows of their own and in shared
rows, and must give the same; and what it says of one response must not change when another one does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from bdpo_pl.data.batches import pair_documents
from bdpo_pl.data.packing import Document, RowLayout, lay_out
from bdpo_pl.data.table import PairTable
from bdpo_pl.errors import InputError
from bdpo_pl.forward.equivalence import compute_dtype, relative_error, tolerance
from bdpo_pl.forward.masks import set_attention, why_not_shared
from bdpo_pl.forward.responses import response_logps

PrefixSharing = Literal["auto", "always", "never"]

# What a response leaks into another is no rounding: a mask gives exact zeros, so it shows far below the tolerance.
_LEAK_SHARE = 0.02


def choose_layout(
    model: Any,
    table: PairTable,
    option: PrefixSharing = "auto",
    *,
    name: str = "the model",
    attention: str | None = None,
    pad_id: int = 0,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> RowLayout:
    """The best layout in which `model` gives exact log-probabilities; says so where that is not the best there is.

    On a GPU, where the user has not named an implementation, block-sparse attention is tried first, and kept if it
    gives the same log-probabilities.

    Args:
        model: causal language model, on the device it will run on.
        table: pairs to try it on: the longest one and the shortest.
        option: `never` keeps a row for each response; `always` does not take less than shared rows for an answer.
        name: of the model, for messages.
        attention: the implementation that the user named, if any.
        pad_id: fills the padding.
        context: entered around each forward pass, for autocast.

    Raises:
        InputError: `always`, and the model cannot.
    """
    if option == "never":
        return RowLayout.SPLIT
    documents = probe_documents(table)
    on_gpu = _on_gpu(model)
    if on_gpu and attention is None and getattr(model, "_supports_flex_attn", False):
        before = model.config._attn_implementation
        set_attention(model, "flex_attention")
        objection = _objection(model, documents, RowLayout.ONE_ROW, pad_id, context, reference=before)
        if objection is None:
            return RowLayout.ONE_ROW
        set_attention(model, before)
        rank_zero_info(f"Block-sparse attention is not used: {objection}")
    layout = RowLayout.ONE_ROW if attention == "flex_attention" and on_gpu else RowLayout.SHARED
    objection = _objection(model, documents, layout, pad_id, context)
    if objection is None:
        return layout
    if option == "always":
        raise InputError(
            f"model.prefix_sharing is always, but {name} cannot share a prompt: {objection}; set it to auto"
        )
    rank_zero_info(f"Prompts are not shared, each response has a row of its own: {objection}")
    return RowLayout.SPLIT


def probe_documents(table: PairTable) -> list[Document]:
    """A few pairs to try a model on: the longest and the shortest."""
    sizes = table.num_tokens(shared=True)
    return pair_documents([table[i] for i in dict.fromkeys((int(sizes.argmax()), int(sizes.argmin())))])


def _on_gpu(model: Any) -> bool:
    return next(model.parameters()).device.type == "cuda"


def _objection(
    model: Any,
    documents: Sequence[Document],
    layout: RowLayout,
    pad_id: int,
    context: Callable[[], AbstractContextManager[Any]],
    reference: str | None = None,
) -> str | None:
    """Why `layout` will not do for `model`, or None; `reference`: the attention to compare with, if another."""
    if known := why_not_shared(model):
        return known
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), context():
            bound = tolerance(compute_dtype(model))
            shared = _logps(model, documents, layout, pad_id)
            changed = _logps(model, _with_another_response(documents, model), layout, pad_id)
            if reference is not None:
                used = model.config._attn_implementation
                set_attention(model, reference)
            alone = _logps(model, documents, RowLayout.SPLIT, pad_id, whole=True)
            if reference is not None:
                set_attention(model, used)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[:1]
        return f"{type(model).__name__} fails on such rows ({type(error).__name__}: {''.join(reason)})"
    finally:
        model.train(was_training)
    # Only the first sequence was changed.
    leak = relative_error(changed[1:], shared[1:])
    if not leak <= _LEAK_SHARE * bound:
        return f"a response is seen by another (log-probabilities change by {leak:.2g} of their size)"
    difference = relative_error(shared, alone)
    if not difference <= bound:
        return f"log-probabilities differ from those of responses alone by {difference:.2g} of their size"
    return None


def _logps(model: Any, documents: Sequence[Document], layout: RowLayout, pad_id: int, whole: bool = False) -> Tensor:
    batch = lay_out(documents, layout, pad_id)
    return response_logps(model, batch.to(next(model.parameters()).device), whole=whole)


def _with_another_response(documents: Sequence[Document], model: Any) -> list[Document]:
    """`documents` with every token of sequence 0 replaced by another."""
    V = model.config.get_text_config().vocab_size
    first, *rest = documents
    (number, ids), *others = first.responses
    assert number == 0
    return [first._replace(responses=[(0, [(token + 1) % V for token in ids]), *others]), *rest]
