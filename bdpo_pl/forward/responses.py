"""A causal language model's log-probabilities of responses, with only their positions sent through its LM head.

Shapes: S sequences; R rows of T positions; N scored tokens; D hidden size; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from bdpo_kernels import linear_sequence_logprob, sequence_logprob
from bdpo_pl.data.packing import SequenceBatch
from bdpo_pl.forward.last_layer import scored_positions_only
from bdpo_pl.forward.masks import model_inputs
from bdpo_pl.parallel.tensor_parallel import VocabParallelHead


def response_logps(
    model: nn.Module,
    batch: SequenceBatch,
    on_hidden: Callable[[Tensor], None] | None = None,
    *,
    whole: bool = False,
) -> Tensor:
    """log π(response | context) of each sequence, summed over its scored tokens.

    Args:
        model: a transformers causal language model (or a wrapper with its `get_output_embeddings`).
        batch: S sequences, N scored tokens in them.
        on_hidden: called with the (R, T, D) hidden states that enter the LM head, those of all positions.
        whole: leave nothing out that is not read, as without `on_hidden` (for comparisons).

    Returns:
        (S,) float32, with gradients to the model's parameters.
    """

    def select(hidden: Tensor) -> Tensor:
        if on_hidden is not None:
            on_hidden(hidden)
        return hidden.flatten(0, 1).index_select(0, batch.score_index).unsqueeze(0)

    narrow = nullcontext() if whole or on_hidden is not None else scored_positions_only(model, batch)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(head, VocabParallelHead):
        with narrow:
            return _vocab_parallel_logps(model, head, batch, select)
    with narrow, head_input(model, select) as head_calls:
        logits = model(**model_inputs(model, batch)).logits
    calls = len(head_calls)
    N, V = batch.labels.shape[0], logits.shape[-1]
    if not calls:
        # A model whose head is not the module it names: its logits cover every position.
        logits = logits.flatten(0, -2).index_select(0, batch.score_index)
    elif calls != 1 or logits.numel() != N * V:
        raise RuntimeError(
            f"{type(model).__name__} does not send its final hidden states through its LM head just once, "
            "so the positions to score cannot be selected before it"
        )
    logits = logits.reshape(N, V)
    # Labels were checked against the vocabulary before training (models.check_vocabulary): no need to wait for the GPU.
    return sequence_logprob(logits, batch.labels, batch.sequence_ids, batch.num_sequences, check_labels=False)


def _vocab_parallel_logps(
    model: nn.Module, head: VocabParallelHead, batch: SequenceBatch, select: Callable[[Tensor], Tensor]
) -> Tensor:
    """The same of a head that is split over ranks, none of which sees all logits."""
    results: list[Tensor] = []

    def compute(hidden: Tensor) -> Tensor:
        results.append(
            linear_sequence_logprob(
                select(hidden).squeeze(0), head.local_weight(), batch.labels, batch.sequence_ids, batch.num_sequences,
                shard=head.shard, check_labels=False,
            )
        )  # fmt: skip
        return hidden[:, :0]

    with head_input(model, compute):
        model(**model_inputs(model, batch))
    (logps,) = results
    return logps


@contextmanager
def head_input(model: Any, replace: Callable[[Tensor], Tensor]) -> Iterator[list[None]]:
    """While open, the LM head is given `replace(hidden)` in place of its (R, T, D) hidden states.

    A hook on the head, instead of a computation of our own in its place, keeps whatever the architecture does around it
    (Gemma's soft-cap, Cohere's and Granite's scales) and works for wrapped and sharded heads alike. Yields a list that
    grows by one with each call of the head.
    """
    head = model.get_output_embeddings()
    calls: list[None] = []
    if head is None:
        yield calls
        return

    def before_head(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        calls.append(None)
        return (replace(hidden), *rest)

    handle = head.register_forward_pre_hook(before_head)
    try:
        yield calls
    finally:
        handle.remove()
