"""Log-probabilities of rows that several ranks read together, and the trial that admits a model to it.

Shapes: S sequences; R rows of T positions; D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from bdpo_pl.data.batches import pair_documents
from bdpo_pl.data.packing import Document, RowLayout, SequenceBatch, lay_out
from bdpo_pl.data.stripes import stripe_of
from bdpo_pl.data.table import PairTable
from bdpo_pl.errors import InputError, first_line
from bdpo_pl.forward.equivalence import (
    compute_dtype,
    evaluating,
    gradient_error,
    rounding_of_gradients,
    rounding_of_logps,
)
from bdpo_pl.forward.masks import KINDS, layer_kinds, rotates_alike
from bdpo_pl.forward.reading import read, weighted
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.precision import device_of
from bdpo_pl.parallel.context_parallel import REPLACED, ContextGroup

# Tokens of the prompt and of each response in the trial, which one device must be able to read whole.
_PROMPT, _RESPONSE = 96, 48


def logps_together(model: CausalLM, batch: SequenceBatch, context: ContextGroup, *, fused: bool = False) -> Tensor:
    """Return what `response_logps` returns, computed by all ranks of `context`, each at its own positions.

    All ranks call this function with the same batch, and get the same log-probabilities. After the backward pass of the
    same loss on each, the mean of the parameters' gradients over the ranks is the gradient of that loss.

    Args:
        model: causal language model; `share_attention` has been called.
        batch: whole batch of S sequences.
        context: ranks that share its rows.
        fused: compute logits a chunk at a time with gradients too (`why_not_fused` has returned None).

    Returns:
        (S,) float32, with gradients to the model's parameters.
    """
    return context.total(response_logps(model, stripe_of(batch, context.rank, context.size), fused=fused))


def short_documents(table: PairTable) -> list[Document]:
    """Return the longest and the shortest pair of `table`, both cut to what any device can read whole."""
    sizes = table.num_tokens(shared=True)
    chosen = dict.fromkeys((int(sizes.argmax()), int(sizes.argmin())))
    return [
        Document(whole.context[-_PROMPT:], [(number, ids[:_RESPONSE]) for number, ids in whole.responses])
        for whole in pair_documents([table[i] for i in chosen])
    ]


def check_reading(
    model: CausalLM,
    documents: Sequence[Document],
    layout: RowLayout,
    context: ContextGroup,
    *,
    name: str,
    pad_id: int = 0,
    autocast: Callable[[], AbstractContextManager[object]],
) -> None:
    """Compare rows that the ranks read together with the same rows read by each rank alone.

    Args:
        model: causal language model, on the device that it will run on.
        documents: pairs for the comparison.
        layout: layout of the rows.
        context: ranks that share rows.
        name: name of the model, for messages.
        pad_id: token id of the padding.
        autocast: context manager that is entered around each forward pass.

    Raises:
        InputError: log-probabilities or gradients differ, or the model cannot be read in this way.
    """
    objection = why_not_together(model) or _difference(model, documents, layout, context, pad_id, autocast)
    faults = torch.tensor(float(objection is not None), device=device_of(model))
    dist.all_reduce(faults)
    if faults:
        reason = objection or "another process found that its results differ"
        raise InputError(
            f"trainer.strategy.context_parallel_size is {context.size}, but the ranks cannot share the rows of {name}: "
            f"{reason}; set it to 1"
        )


def why_not_together(model: CausalLM) -> str | None:
    """Return why, by its configuration, ranks cannot share rows of `model`; None if no reason is known."""
    config = model.config.get_text_config()
    if getattr(model, "_is_stateful", False):
        return f"{type(model).__name__} carries a state from token to token, which a part of a row lacks"
    if unknown := sorted(layer_kinds(config) - KINDS):
        return f"its {', '.join(unknown)} layers are no attention whose heads could be divided"
    if getattr(config, "alibi", False):
        return "its ALiBi biases depend on the number of the head"
    if config._attn_implementation not in REPLACED:
        return (
            f"heads of {config._attn_implementation} attention are not divided, only those of {' and '.join(REPLACED)} "
            "(model.attn_implementation)"
        )
    if not rotates_alike(config):
        return "the angles of its rotary embedding depend on the length of a row, of which each rank sees a part"
    return None


def _difference(
    model: CausalLM,
    documents: Sequence[Document],
    layout: RowLayout,
    context: ContextGroup,
    pad_id: int,
    autocast: Callable[[], AbstractContextManager[object]],
) -> str | None:
    batch = lay_out(documents, layout, pad_id).to(device_of(model))
    T = batch.input_ids.shape[1]

    def alone() -> tuple[Tensor, Tensor]:
        logps = response_logps(model, batch, whole=True)
        return logps, weighted(logps)

    def together() -> tuple[Tensor, Tensor]:
        logps = logps_together(model, batch, context)
        # Each rank's gradient is C times its share.
        return logps, weighted(logps) / context.size

    def rows(gradient: Tensor) -> Tensor:
        return context.whole_rows(gradient)[:, :T]

    try:
        with evaluating(model), autocast():
            dtype = compute_dtype(model)
            expected = read(model, batch, documents, alone)
            found = read(model, batch, documents, together, join=rows)
    except InputError:
        raise
    except Exception as error:
        return f"{type(model).__name__} fails on parts of rows ({type(error).__name__}: {first_line(error)})"
    lengths = torch.bincount(batch.sequence_ids, minlength=batch.num_sequences)
    difference = (found.logps - expected.logps).abs()
    if not (difference <= rounding_of_logps(expected.logps, lengths, dtype)).all():
        return f"log-probabilities differ from those of whole rows by {difference.max():.2g} nats"
    if not (share := gradient_error(found.parts, expected.parts)) <= rounding_of_gradients(dtype):
        return f"gradients differ from those of whole rows by {share:.2g} of their size"
    return None
