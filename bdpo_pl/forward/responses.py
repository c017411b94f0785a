"""A causal language model's log-probabilities of responses; only their positions pass through its LM head.

Shapes: S sequences; R rows of T positions; N scored tokens; D hidden size; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bdpo_kernels import linear_sequence_logprob, sequence_logprob
from bdpo_pl.data.packing import SequenceBatch
from bdpo_pl.forward.agreement import largest
from bdpo_pl.forward.equivalence import compute_dtype, rounding_of_logps
from bdpo_pl.forward.last_layer import scored_positions_only
from bdpo_pl.forward.masks import model_inputs
from bdpo_pl.models.architectures import logit_transform
from bdpo_pl.models.causal_lm import CausalLM, Head
from bdpo_pl.parallel.tensor_parallel import VocabParallelHead, head_weight

# Number of tokens whose log-probabilities are compared with those of the model's own logits, at the first such reading.
# A different soft-cap or scale causes an error far larger than rounding, whatever the order in which products are
# summed.
_COMPARED, _LENIENCE = 64, 2.0
_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Results of the comparison: true for a model whose logits are only those of its LM head, soft-cap and scale."""


@contextmanager
def own_logits(model: nn.Module) -> Iterator[None]:
    """Make `response_logps` read the model's own logits while the context is open, as after a failed comparison."""
    known = _plain.get(model)
    _plain[model] = False
    try:
        yield
    finally:
        if known is None:
            del _plain[model]
        else:
            _plain[model] = known


def response_logps(
    model: CausalLM,
    batch: SequenceBatch,
    on_hidden: Callable[[Tensor], None] | None = None,
    *,
    whole: bool = False,
    fused: bool = False,
) -> Tensor:
    """Return log π(response | context) of each sequence, summed over its scored tokens.

    Without gradients (scoring, validation, a live reference), logits are computed a chunk at a time, and compared once
    for each model with its own logits. If they differ, or with gradients, the model's own logits are used.

    Args:
        model: transformers causal language model (or a wrapper with its `get_output_embeddings`).
        batch: batch of S sequences with N scored tokens.
        on_hidden: function that is called with the (R, T, D) hidden states that enter the LM head, at all positions.
        whole: compute everything that the model does, even outputs that are not read (for comparisons).
        fused: compute logits a chunk at a time with gradients too, and again in the backward pass, without a
            comparison: `why_not_fused` has returned None for the model.

    Returns:
        (S,) float32, with gradients to the model's parameters.
    """

    def select(hidden: Tensor) -> Tensor:
        if on_hidden is not None:
            on_hidden(hidden)
        return hidden.flatten(0, 1).index_select(0, batch.score_index).unsqueeze(0)

    def narrow() -> AbstractContextManager[None]:
        return nullcontext() if whole or on_hidden is not None else scored_positions_only(model, batch)

    head = model.get_output_embeddings()
    split = isinstance(head, VocabParallelHead)
    plain = not whole and not torch.is_grad_enabled() and type(head) is nn.Linear and _plain.get(model, True)
    if head is not None and (split or plain or fused):
        with narrow():
            logps = _from_head(model, head, batch, select, checked=split or fused or model in _plain)
        if logps is not None:
            return logps
    with narrow(), head_input(model, select) as head_calls:
        logits = model(**model_inputs(model, batch)).logits
    calls = len(head_calls)
    N, V = batch.labels.shape[0], logits.shape[-1]
    if not calls:
        # If a model's head is not the module that it names, its logits cover every position.
        logits = logits.flatten(0, -2).index_select(0, batch.score_index)
    elif calls != 1 or logits.numel() != N * V:
        raise RuntimeError(
            f"{type(model).__name__} does not send its final hidden states through its LM head just once, "
            "so the positions to score cannot be selected before it"
        )
    logits = logits.reshape(N, V)
    # Labels were checked against the vocabulary before training (models.check_vocabulary), so no synchronisation is
    # needed.
    return sequence_logprob(logits, batch.labels, batch.sequence_ids, batch.num_sequences, check_labels=False)


def _from_head(
    model: CausalLM, head: Head, batch: SequenceBatch, select: Callable[[Tensor], Tensor], checked: bool
) -> Tensor | None:
    """Return the log-probabilities from logits that are computed a chunk at a time.

    Return None if they differ from those of the model's own logits.

    Args:
        model: causal language model.
        head: LM head of the model, whole or split over ranks, none of which sees all logits.
        batch: batch of S sequences with N scored tokens.
        select: function that returns the (1, N, D) hidden states of the scored positions.
        checked: skip the comparison of the first tokens with the model's own logits, whose result is in `_plain`.
    """
    softcap, scale = logit_transform(model.config)
    n = min(_COMPARED, len(batch.labels))
    results: list[Tensor] = []

    def logps(packed: Tensor, labels: Tensor, sequences: Tensor, number: int, lengths: Sequence[int] | None) -> Tensor:
        weight, shard = head_weight(head)
        return linear_sequence_logprob(
            packed, weight, labels, sequences, number, bias=head.bias, softcap=softcap, logit_scale=scale,
            shard=shard, check_labels=False, lengths=lengths,
        )  # fmt: skip

    def compute(hidden: Tensor) -> Tensor:
        packed = select(hidden).squeeze(0)
        results.append(logps(packed, batch.labels, batch.sequence_ids, batch.num_sequences, batch.scored_lengths))
        if checked:
            return hidden[:, :0]
        each = torch.arange(n, device=packed.device)
        results.append(logps(packed[:n], batch.labels[:n], each, n, [1] * n))
        return packed[:n].unsqueeze(0)

    with head_input(model, compute):
        logits = model(**model_inputs(model, batch)).logits
    if not checked:
        agrees = len(results) == 2 and _agrees(results[1], logits, batch.labels[:n], compute_dtype(model))
        # Ranks that share the model compute together, so all choose the same way.
        _plain[model] = not largest(model, float(not agrees))
        if not _plain[model]:
            return None
    return results[0]


def _agrees(values: Tensor, logits: Tensor, labels: Tensor, dtype: torch.dtype) -> bool:
    """Return true if `values` are the log-probabilities of `labels` by `logits`, up to rounding."""
    if logits.shape[:-1] != (1, len(labels)):
        return False
    own = logits[0].float().log_softmax(dim=-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    bound = _LENIENCE * rounding_of_logps(own, torch.ones_like(own), dtype)
    return bool(((values - own).abs() <= bound).all())


@contextmanager
def head_input(model: CausalLM, replace: Callable[[Tensor], Tensor]) -> Iterator[list[None]]:
    """Replace the (R, T, D) hidden states that enter the LM head by `replace(hidden)`, while the context is open.

    A hook on the head, instead of our own computation in its place, keeps the operations of the architecture around the
    head (Gemma's soft-cap, Cohere's and Granite's scales), and works for wrapped and sharded heads alike. Yields a list
    that grows by one with each call of the head.
    """
    head = model.get_output_embeddings()
    calls: list[None] = []
    if head is None:
        yield calls
        return

    def before_head(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = args
        calls.append(None)
        return (replace(hidden), *rest)

    handle = head.register_forward_pre_hook(before_head)
    try:
        yield calls
    finally:
        handle.remove()
