"""Logits of the token that follows a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch

from bdpo_pl.forward.equivalence import evaluating
from bdpo_pl.forward.generation import check_fits, pad_left
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.precision import device_of


@torch.no_grad()
def next_token_logits(
    model: CausalLM, prompts: Sequence[list[int]], token_ids: Sequence[int], *, batch_size: int = 32
) -> torch.Tensor:
    """Return the float32 logits of `token_ids` after each of `prompts`, as a matrix with a row for each prompt.

    Args:
        model: causal language model; it runs on its device, in evaluation mode.
        prompts: token ids of each prompt, at least one.
        token_ids: the tokens whose logits are returned.
        batch_size: number of prompts passed to the model at a time.

    Raises:
        InputError: a prompt does not fit into the model's positions.
    """
    check_fits(model, prompts, 1)
    device = device_of(model)
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    chosen = torch.tensor(list(token_ids), device=device)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = torch.empty(len(prompts), len(token_ids))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, mask = pad_left([prompts[i] for i in rows], 0, device)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **keep).logits[:, -1]
            found[rows] = logits[:, chosen].float().cpu()
    return found
