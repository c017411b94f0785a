"""What a model makes of a batch, with gradients: the log-probabilities of its responses, and where they come from.

Two ways of computing the same agree if both agree: a fault in a backward pass leaves every log-probability as it is.
The gradients are those of a weighted sum of the log-probabilities with respect to the embeddings of the tokens, so a
backward pass runs through every layer, and a frozen model has them too.

Shapes: S sequences; R rows of T positions; D hidden size; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdpo_pl.data.packing import Document, SequenceBatch


@dataclass
class Reading:
    """A model's log-probabilities of responses, with their gradients.

    Attributes:
        logps: (S,) float32.
        parts: gradients by the tokens' embeddings, a piece for each context, then one for each response.
        head: (V, D) gradient by the LM head's weight; None if that is frozen or was not asked for.
    """

    logps: Tensor
    parts: list[Tensor]
    head: Tensor | None = None


def read(
    model: Any,
    batch: SequenceBatch,
    documents: Sequence[Document],
    run: Callable[[], tuple[Tensor, Tensor]],
    *,
    head: bool = False,
) -> Reading:
    """Run `model` on `batch`, forwards and backwards; its parameters' own gradients stay as they are.

    Args:
        model: in the mode that it is to be read in.
        batch: of the sequences of `documents`, in any layout.
        documents: what is in the batch; a context's gradients are summed over its copies.
        run: calls the model; gives (S,) log-probabilities, and the scalar whose gradients are wanted.
        head: take the gradient of the LM head's weight as well.

    Raises:
        RuntimeError: the model does not embed its tokens just once.
    """
    with torch.enable_grad(), _embedded(model) as embedded, _head_weights(model if head else None) as weights:
        logps, value = run()
        if len(embedded) != 1:
            raise RuntimeError(f"{type(model).__name__} does not embed its tokens just once")
        trained = [weight for weight in weights[:1] if weight.requires_grad]
        gradients = torch.autograd.grad(value, [*embedded, *trained])
    by_token = gradients[0].flatten(0, 1)
    return Reading(logps.detach(), _pieces(by_token, batch, documents), gradients[1] if trained else None)


def weighted(logps: Tensor) -> Tensor:
    """A sum of `logps` with weights of either sign and of different sizes, so that no two of them can be exchanged."""
    weights = torch.arange(1, len(logps) + 1, device=logps.device, dtype=logps.dtype)
    return (logps * weights * (-1) ** torch.arange(len(logps), device=logps.device)).sum()


def _pieces(by_token: Tensor, batch: SequenceBatch, documents: Sequence[Document]) -> list[Tensor]:
    """(n, D) gradients of the n tokens of each context, then of each response."""
    spans = batch.spans.tolist()
    contexts = [
        sum(by_token[start:end] for start, end in {tuple(spans[number][:2]) for number, _ in document.responses})
        for document in documents
    ]
    # What a context's last token gets of each response is in both.
    responses = [by_token[start:end] for *_, start, end in spans]
    return [*contexts, *responses]  # type: ignore[list-item]


@contextmanager
def _embedded(model: Any) -> Iterator[list[Tensor]]:
    """While open, the embeddings of tokens are leaves of the graph, and collected."""
    leaves: list[Tensor] = []

    def cut(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = model.get_input_embeddings().register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()


@contextmanager
def _head_weights(model: Any | None) -> Iterator[list[Tensor]]:
    """While open, the LM head's weight is collected as it is within a call: whole, where FSDP2 splits it."""
    weights: list[Tensor] = []
    if model is None:
        yield weights
        return

    def keep(head: Any, _: tuple[Any, ...]) -> None:
        weights.append(head.weight)

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield weights
    finally:
        handle.remove()
