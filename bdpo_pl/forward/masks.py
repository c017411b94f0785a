"""Attention over rows that hold several sequences: who sees whom, in the form that each implementation reads.

A token sees the tokens of its own document that came before it in its context or in its own response, as far back as
the layer's window allows. Distances are those of positions, not of places in the row, so windows and chunks are where
they would be if every sequence stood alone.

Shapes: R rows; T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bdpo_pl.data.packing import SequenceBatch

_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})

_RECOMPILATIONS = 64

Sees = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(row, query's place, key's place) → whether the query sees the key; broadcasts."""


def model_inputs(model: Any, batch: SequenceBatch) -> dict[str, Any]:
    """What `model` is called with, so that each sequence of `batch` stands alone behind its context.

    Raises:
        ValueError: the rows are shared, and the model's attention cannot be told so (see `why_not_shared`).
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if not batch.shared:
        return inputs | {"attention_mask": batch.attention_mask}
    return inputs | {"attention_mask": _masks(model, batch), "position_ids": batch.position_ids}


def why_not_shared(model: Any) -> str | None:
    """What in the configuration of `model` keeps sequences from sharing a row; None if nothing is known to."""
    config = model.config.get_text_config()
    if getattr(model, "_is_stateful", False):
        return f"{type(model).__name__} carries a state from token to token, which cannot branch"
    if unknown := sorted(_layer_kinds(config) - _KINDS):
        return f"its {', '.join(unknown)} layers have no mask that could keep two responses apart"
    if getattr(config, "alibi", False):
        return "its ALiBi biases are told distances in the row, not positions"
    if config._attn_implementation not in _FORMS:
        return (
            f"{config._attn_implementation} attention takes no mask that could keep two responses apart; "
            "sdpa and flex_attention do"
        )
    return None


def set_attention(model: Any, implementation: str) -> None:
    """Switch the attention implementation of `model`, all its layers."""
    if implementation == "flex_attention":
        allow_recompilation()
    if model.config._attn_implementation != implementation:
        model.set_attn_implementation(implementation)


def _masks(model: Any, batch: SequenceBatch) -> Any:
    """One mask, or one for each kind of layer where a model has several."""
    config = model.config.get_text_config()
    if config._attn_implementation not in _FORMS:
        raise ValueError(f"shared rows need a mask, and {config._attn_implementation} attention takes none")
    form = _FORMS[config._attn_implementation]
    kinds = _layer_kinds(config)
    masks = {kind: form(_sees(batch, kind, config), batch, model.dtype) for kind in kinds}
    return masks if len(masks) > 1 else masks.popitem()[1]


def _layer_kinds(config: Any) -> set[str]:
    if kinds := getattr(config, "layer_types", None):
        return set(kinds)
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return {"sliding_attention" if windowed else "full_attention"}


def _sees(batch: SequenceBatch, kind: str, config: Any) -> Sees:
    documents, branches, positions = batch.documents, batch.branches, batch.position_ids

    def sees(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        branch = branches[row, key]
        distance = positions[row, query] - positions[row, key]
        seen = (documents[row, query] == documents[row, key]) & (distance >= 0)
        seen = seen & ((branch == 0) | (branch == branches[row, query]))
        if kind == "sliding_attention":
            seen = seen & (distance < config.sliding_window)
        elif kind == "chunked_attention":
            size = config.attention_chunk_size
            seen = seen & (positions[row, query] // size == positions[row, key] // size)
        return seen

    return sees


def _dense(sees: Sees, batch: SequenceBatch, dtype: torch.dtype) -> Tensor:
    """(R, 1, T, T) bool, True where the query sees the key. Padding sees padding, so that no row of it is empty."""
    R, T = batch.input_ids.shape
    device = batch.input_ids.device
    place = torch.arange(T, device=device)
    return sees(torch.arange(R, device=device).view(R, 1, 1), place.view(1, T, 1), place.view(1, 1, T)).unsqueeze(1)


def _additive(sees: Sees, batch: SequenceBatch, dtype: torch.dtype) -> Tensor:
    """(R, 1, T, T), 0 where the query sees the key and the lowest number of `dtype` elsewhere."""
    hidden = ~_dense(sees, batch, dtype)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min)


def _blocks(sees: Sees, batch: SequenceBatch, dtype: torch.dtype) -> Any:
    """A block mask, whose hidden blocks are not computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    R, T = batch.input_ids.shape
    device = batch.input_ids.device
    make = _compiled_block_mask() if device.type == "cuda" else create_block_mask
    return make(lambda row, _, query, key: sees(row, query, key), R, None, T, T, str(device))


@cache
def _compiled_block_mask() -> Callable[..., Any]:
    """PyTorch's `create_block_mask`, compiled once: it never holds a mask of all places."""
    from torch.nn.attention.flex_attention import create_block_mask

    allow_recompilation()
    return torch.compile(create_block_mask)


def allow_recompilation() -> None:
    """Raise the number of compilations of one function after which PyTorch silently runs it uncompiled.

    FlexAttention is compiled for each kind of layer, with and without gradients, with static and with dynamic shapes,
    and for a reference with other heads once more: 8, the default, is within reach, and past it all scores of all
    places are held in memory.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILATIONS)


_FORMS: dict[str, Callable[[Sees, SequenceBatch, torch.dtype], Any]] = {
    "sdpa": _dense,
    "eager": _additive,
    "flex_attention": _blocks,
}
"""Masks by the name of the attention implementation."""
