"""Requirements on every model before anything is computed with it: causal, and without noise in training mode.

Both are tried on a real pair, because neither can be read with certainty from a configuration.

Shapes: T positions; D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from bdpo_pl.data.packing import Document, RowLayout, lay_out
from bdpo_pl.errors import InputError
from bdpo_pl.forward.equivalence import compute_dtype, evaluating
from bdpo_pl.forward.masks import model_inputs
from bdpo_pl.forward.responses import head_input
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.precision import device_of

# Relative to the norm of the hidden states. The arithmetic and its order are the same, so there is no rounding error,
# except with kernels whose order of summation varies.
_BOUND = {torch.float32: 1e-4, torch.float64: 1e-8}
_HALF_BOUND = 2e-2
_LONGEST = 64


@torch.no_grad()
def check_sound(
    model: CausalLM, document: Document, name: str, pad_id: int, context: Callable[[], AbstractContextManager[object]]
) -> None:
    """Raise `InputError` unless `model` is causal, and computes the same in training mode as in evaluation mode.

    Args:
        model: model, on the device that it will run on; its mode is restored.
        document: real document, whose beginning is read.
        name: name of the model, for messages.
        pad_id: token id of the padding.
        context: context manager that is entered around each forward pass, for autocast.
    """
    ids = [*document.context, *document.responses[0][1]][:_LONGEST]
    half = max(1, len(ids) // 2)
    V = model.config.get_text_config().vocab_size
    with context():
        bound = _BOUND.get(compute_dtype(model), _HALF_BOUND)
        with evaluating(model):
            expected = _hidden(model, ids, pad_id)
            changed = _hidden(model, [*ids[:half], *((token + 1) % V for token in ids[half:])], pad_id)
        if not (error := _difference(changed[:half], expected[:half])) <= bound:
            raise InputError(
                f"{name} ({type(model).__name__}) is not a causal language model: its output at a position changes "
                f"with the tokens after it (hidden states by {error:.2g} of their size), so the log-probability of a "
                "response is meaningless; choose a model that was trained to predict the next token"
            )
        with evaluating(model):
            model.train()
            for module in model.modules():
                # The user asked for this dropout, and was warned.
                for dropout in getattr(module, "lora_dropout", {}).values():
                    dropout.eval()
            noisy = [_hidden(model, ids, pad_id) for _ in range(2)]
    if not (error := max(_difference(states, expected) for states in noisy)) <= bound:
        raise InputError(
            f"{name} ({type(model).__name__}) computes something else in training mode (hidden states differ by "
            f"{error:.2g} of their size): it has dropout or other noise that its configuration does not name; "
            "set it to zero in the model's config.json"
        )


def _hidden(model: CausalLM, ids: list[int], pad_id: int) -> Tensor:
    """Return the (T, …) hidden states that enter the LM head, or the logits of a model that names no head."""
    batch = lay_out([Document(ids[:1], [(0, ids[1:] or ids)])], RowLayout.SPLIT, pad_id)
    batch = batch.to(device_of(model))
    found: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        found.append(hidden[0])
        # The logits of one position are enough for the rest of the forward pass.
        return hidden[:, -1:]

    with head_input(model, keep):
        logits = model(**model_inputs(model, batch)).logits
    return (found[0] if found else logits[0]).float()


def _difference(values: Tensor, expected: Tensor) -> float:
    """Return the largest difference at a position, relative to its norm; NaN if any value is NaN."""
    sizes = expected.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((values - expected).flatten(1).norm(dim=1) / sizes).max().item()
