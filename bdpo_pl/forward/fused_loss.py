"""LM head and loss in one operation, so that training never holds the logits of a batch.

The hidden states of the scored positions are taken where they enter the head, and `linear_preference_loss` computes the
loss from them chunk by chunk. The function that an architecture applies to its logits after the head (soft-cap, scale)
is read from its configuration. The result is trusted only after one comparison with the model's own logits, of both
values and gradients.

Shapes: B pairs; S = 2B sequences; N scored tokens; D hidden size; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from bdpo_kernels import linear_preference_loss, linear_sequence_logprob
from bdpo_pl.data.packing import Document, SequenceBatch
from bdpo_pl.errors import InputError
from bdpo_pl.forward.agreement import with_less_memory
from bdpo_pl.forward.equivalence import (
    compute_dtype,
    evaluating,
    gradient_error,
    rounding_of_gradients,
    rounding_of_logps,
)
from bdpo_pl.forward.last_layer import scored_positions_only
from bdpo_pl.forward.masks import model_inputs
from bdpo_pl.forward.reading import read, values
from bdpo_pl.forward.responses import head_input, response_logps
from bdpo_pl.models.architectures import logit_transform
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.parallel.tensor_parallel import VocabParallelHead, head_weight

# Label of tokens that the kernels leave out.
_IGNORED = -100

LMHead = Literal["auto", "fused", "logits"]

LossOfPairs = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(chosen (b,), rejected (b,), pair index (b,)) → weighted loss of each pair (b,)."""


def fused_preference_loss(
    model: CausalLM,
    batch: SequenceBatch,
    loss_of_pairs: LossOfPairs,
    on_rejected: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sum of the pairs' losses, and the log-probabilities from which it was computed.

    Args:
        model: causal language model for which `why_not_fused` returns None.
        batch: batch of 2B sequences, the chosen responses of all pairs before the rejected ones.
        loss_of_pairs: function that returns each pair's weighted loss; it is called with some of the pairs at a time.
        on_rejected: function that is called with the (B,) log-probabilities of all rejected responses, before
            `loss_of_pairs`. Then they have no gradients, and `loss_of_pairs` gets zeros in their place.

    Returns:
        Scalar loss with gradients to the model's parameters; (2, B) log-probabilities without gradients.
    """
    head = model.get_output_embeddings()
    assert head is not None
    softcap, scale = logit_transform(model.config)
    num_pairs = batch.num_sequences // 2
    results: list[tuple[Tensor, Tensor, Tensor]] = []

    def compute(hidden: Tensor) -> Tensor:
        # Computed inside the head's call, because a sharded weight is gathered there.
        packed = hidden.flatten(0, 1).index_select(0, batch.score_index)
        weight, shard = head_weight(head)
        options: dict[str, Any] = {
            "bias": head.bias, "softcap": softcap, "logit_scale": scale, "check_labels": False, "shard": shard,
        }  # fmt: skip
        # The collate function has counted them; Python's numbers are read without waiting for the device.
        labels, lengths = batch.labels, batch.scored_lengths
        known = None
        if on_rejected is not None:
            is_rejected = batch.sequence_ids >= num_pairs
            zeros = (0,) * num_pairs
            alone, of_rejected = labels.masked_fill(~is_rejected, _IGNORED), lengths and zeros + lengths[num_pairs:]
            labels, lengths = labels.masked_fill(is_rejected, _IGNORED), lengths and lengths[:num_pairs] + zeros
            with torch.no_grad():
                known = linear_sequence_logprob(
                    packed, weight, alone, batch.sequence_ids, 2 * num_pairs, lengths=of_rejected, **options
                )[num_pairs:]
            on_rejected(known)
        loss, chosen, rejected = linear_preference_loss(
            packed, weight, labels, batch.sequence_ids, loss_of_pairs, num_pairs=num_pairs, lengths=lengths, **options
        )
        results.append((loss, chosen, rejected if known is None else known))
        # The head itself gets no positions, so it computes nothing.
        return hidden[:, :0]

    with scored_positions_only(model, batch), head_input(model, compute):
        model(**model_inputs(model, batch))
    ((loss, chosen, rejected),) = results
    return loss, torch.stack([chosen, rejected])


def why_not_fused(
    model: CausalLM, batch: SequenceBatch, shorter: SequenceBatch | None = None, *, backward: bool = True
) -> str | None:
    """Return why `fused_preference_loss` cannot replace `model`'s own logits.

    None means that both agree on `batch`. Without memory for a backward pass over it, gradients are compared on
    `shorter`: training may have room for such a pass, because it holds no logits, nor, with gradient checkpointing,
    which is off here, the activations of all layers.

    Args:
        model: causal language model, on the device that it will run on.
        batch: sequences for the comparison.
        shorter: few and short sequences, for gradients if there is no memory for those of `batch`.
        backward: compare gradients too.

    Raises:
        MachineError: there is no memory for the comparison.
    """
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, VocabParallelHead):
        return f"its LM head is a {type(head).__name__}, not a plain Linear"
    if compute_dtype(model) == torch.float16:
        return "float16 gradients vanish unless the loss is scaled before they are computed; use bf16"

    def less() -> str | None:
        assert shorter is not None
        return why_not_fused(model, batch, backward=False) or why_not_fused(model, shorter)

    return with_less_memory(
        model,
        lambda: _difference(model, batch, backward),
        None if shorter is None else less,
        f"the fused LM head, with rows of {batch.input_ids.shape[1]} tokens",
        "Lower data.max_length, or leave out the trial: set model.lm_head to logits",
    )


def _difference(model: CausalLM, batch: SequenceBatch, backward: bool) -> str | None:
    """Return in what both differ on `batch`, or None."""
    dtype = compute_dtype(model)
    # Each sequence is treated as a document of its own, because both sides read the same rows.
    documents = [Document([0], [(number, [0])]) for number in range(batch.num_sequences)]

    def own() -> tuple[Tensor, Tensor]:
        logps = response_logps(model, batch, whole=True)
        chosen, rejected = logps.view(2, -1)
        return logps, _trial_loss(chosen, rejected, torch.arange(len(chosen), device=chosen.device)).sum()

    def fused() -> tuple[Tensor, Tensor]:
        loss, logps = fused_preference_loss(model, batch, _trial_loss)
        return logps.flatten(), loss

    with evaluating(model):
        expected, found = (
            read(model, batch, documents, run, head=True) if backward else values(run) for run in (own, fused)
        )
    lengths = torch.bincount(batch.sequence_ids, minlength=batch.num_sequences)
    difference = (found.logps - expected.logps).abs()
    if not (difference <= rounding_of_logps(expected.logps, lengths, dtype)).all():
        return (
            f"its logits are not those of its LM head alone (log-probabilities differ by {difference.max():.2g} nats)"
        )
    pairs = [(found.parts, expected.parts, "hidden states")] if backward else []
    if expected.head is not None and found.head is not None:
        pairs.append(([found.head], [expected.head], "LM head"))
    for ours, own_parts, name in pairs:
        error = gradient_error(ours, own_parts)
        if not error <= rounding_of_gradients(dtype):
            return f"gradients of its {name} are not those of its own logits (they differ by {error:.2g} of their size)"
    return None


def _trial_loss(chosen: Tensor, rejected: Tensor, index: Tensor) -> Tensor:
    """Return losses of pairs whose gradients have the same size, however far apart the two responses are."""
    return (1.0 + index) * (0.5 * chosen - 0.4 * rejected)


def choose_head(
    model: CausalLM,
    probe: SequenceBatch,
    option: LMHead,
    name: str,
    *,
    objection: str | None = None,
    shorter: SequenceBatch | None = None,
) -> bool:
    """Decide whether to fuse LM head and loss, and log the reason if they cannot be fused.

    Args:
        model: causal language model, on the device that it will run on.
        probe: sequences on which both ways are compared.
        option: `auto`, or only `fused` or only `logits`.
        name: name of the model, for messages.
        objection: reason why the loss cannot be fused; None: it can be.
        shorter: few and short sequences; see `why_not_fused`.

    Raises:
        InputError: the option is `fused`, and the model does not support it.
        MachineError: there is no memory for the comparison.
    """
    if option == "logits":
        return False
    objection = objection or why_not_fused(model, probe, shorter)
    if objection is None:
        return True
    if option == "fused":
        raise InputError(f"model.lm_head is fused, but {name} cannot be: {objection}; set it to auto")
    rank_zero_info(f"LM head and loss are not fused: {objection}")
    return False
