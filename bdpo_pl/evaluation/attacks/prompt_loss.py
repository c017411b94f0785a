"""Loss of a target at the beginning of a model's answer to each of several prompts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bdpo_pl.forward.generation import check_fits, pad_left
from bdpo_pl.models.causal_lm import CausalLM


@torch.no_grad()
def prompt_losses(model: CausalLM, prompts: Sequence[list[int]], target: Sequence[int], batch_size: int) -> list[float]:
    """Return the mean cross-entropy of `target` after each of `prompts`, in nats per token.

    Args:
        model: a transformers causal language model in evaluation mode.
        prompts: token ids of each prompt, up to the beginning of the answer.
        target: ids with which the answer should begin.
        batch_size: number of prompts in a forward pass.

    Raises:
        InputError: a prompt and the target do not fit into the model's positions.
    """
    check_fits(model, prompts, len(target))
    device = next(model.parameters()).device
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = len(target) + 1
    wanted = torch.tensor(list(target), device=device)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    losses: dict[int, float] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = pad_left([[*prompts[i], *target] for i in chosen], 0, device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **options).logits
        losses.update(zip(chosen, _cross_entropy(logits[:, -len(target) - 1 : -1], wanted).tolist(), strict=True))
    return [losses[i] for i in range(len(prompts))]


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wanted = target.expand(len(logits), -1)
    return F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").mean(1)
