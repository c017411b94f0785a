"""A model's log-probabilities of a batch's responses, and their gradients, for comparisons of two computations.

Two computations are equal only if both values and gradients agree: an error in a backward pass does not change a
log-probability. The gradients are those of a weighted sum of the log-probabilities with respect to the embeddings of
the tokens, so the backward pass runs through every layer, and a frozen model has these gradients too.

Shapes: S sequences; R rows of T positions; D hidden size; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdpo_pl.data.packing import Document, SequenceBatch
from bdpo_pl.models.causal_lm import CausalLM, Head


@dataclass
class Reading:
    """A model's log-probabilities of responses, with their gradients.

    Attributes:
        logps: (S,) float32.
        parts: gradients by the tokens' embeddings, one part for each context, then one for each response.
        head: (V, D) gradient by the LM head's weight; None if that is frozen or was not requested.
    """

    logps: Tensor
    parts: list[Tensor]
    head: Tensor | None = None


def read(
    model: CausalLM,
    batch: SequenceBatch,
    documents: Sequence[Document],
    run: Callable[[], tuple[Tensor, Tensor]],
    *,
    head: bool = False,
    join: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Reading:
    """Run `model` on `batch`, forwards and backwards; the gradients that its parameters already have are not changed.

    Args:
        model: model in training or evaluation mode; the mode is not changed.
        batch: batch of the sequences of `documents`, in any layout.
        documents: documents in the batch; a context's gradients are summed over its copies.
        run: function that calls the model, and returns (S,) log-probabilities, and the scalar to differentiate.
        head: return the gradient of the LM head's weight as well.
        join: function that makes the (R, T, D) gradient of whole rows from that of the positions that the model got.

    Raises:
        RuntimeError: the model does not embed its tokens just once.
    """
    with torch.enable_grad(), _embedded(model) as embedded, _head_weights(model if head else None) as weights:
        logps, value = run()
        if len(embedded) != 1:
            raise RuntimeError(f"{type(model).__name__} does not embed its tokens just once")
        trained = [weight for weight in weights[:1] if weight.requires_grad]
        gradients = torch.autograd.grad(value, [*embedded, *trained])
    by_token = join(gradients[0]).flatten(0, 1)
    return Reading(logps.detach(), _pieces(by_token, batch, documents), gradients[1] if trained else None)


def values(run: Callable[[], tuple[Tensor, Tensor]]) -> Reading:
    """Return the log-probabilities of `run`, as of `read`, without gradients."""
    with torch.no_grad():
        return Reading(run()[0], [])


def weighted(logps: Tensor) -> Tensor:
    """Return a weighted sum of `logps`.

    The weights have both signs and different sizes, so that exchanging two log-probabilities changes the sum.
    """
    weights = torch.arange(1, len(logps) + 1, device=logps.device, dtype=logps.dtype)
    return (logps * weights * (-1) ** torch.arange(len(logps), device=logps.device)).sum()


def _pieces(by_token: Tensor, batch: SequenceBatch, documents: Sequence[Document]) -> list[Tensor]:
    """Return the (n, D) gradients of the n tokens of each context, then of each response."""
    spans = batch.spans.tolist()
    contexts = [
        sum(by_token[start:end] for start, end in {tuple(spans[number][:2]) for number, _ in document.responses})
        for document in documents
    ]
    # The gradient that a context's last token receives from each response is in both.
    responses = [by_token[start:end] for *_, start, end in spans]
    return [*contexts, *responses]  # type: ignore[list-item]


@contextmanager
def _embedded(model: CausalLM) -> Iterator[list[Tensor]]:
    """Make the embeddings of tokens leaves of the graph while the context is open, and collect them."""
    leaves: list[Tensor] = []

    def cut(_: nn.Module, __: tuple[object, ...], output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = model.get_input_embeddings().register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()


@contextmanager
def _head_weights(model: CausalLM | None) -> Iterator[list[Tensor]]:
    """Collect the LM head's weight as it is within a call, while the context is open.

    Within a call it is whole, also if FSDP2 splits it.
    """
    weights: list[Tensor] = []
    if model is None:
        yield weights
        return

    def keep(head: Head, _: tuple[object, ...]) -> None:
        weights.append(head.weight)

    whole = model.get_output_embeddings()
    assert whole is not None, "why_not_fused has looked at the LM head"
    handle = whole.register_forward_pre_hook(keep)
    try:
        yield weights
    finally:
        handle.remove()
