"""Batched generation of responses to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def generate_responses(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    use_template: bool = True,
) -> list[str]:
    """Greedy responses to `prompts`, in order, special tokens removed.

    Args:
        model: causal language model; generates on its own device, in evaluation mode.
        tokenizer: the model's. A prompt becomes the user's turn of its chat template, if it has one.
        prompts: user's texts.
        max_new_tokens: tokens in a response at most.
        batch_size: prompts generated at a time.
        use_template: render with the chat template.
    """
    if use_template and tokenizer.chat_template:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
        special = False
    else:
        texts, special = list(prompts), True
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    encoded = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    # Like lengths together, as in scoring; answers go back to the order of the prompts.
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    responses = [""] * len(encoded)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = _pad_left([encoded[i] for i in chosen], pad_id, device)
            output = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=pad_id,
                # A model's sampling defaults mean nothing to greedy decoding, which would warn of each.
                temperature=None,
                top_p=None,
                top_k=None,
            )
            texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                responses[i] = text.strip()
    finally:
        model.train(was_training)
    return responses


def _pad_left(rows: list[list[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the left: generation goes on from the last position of every row."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)
