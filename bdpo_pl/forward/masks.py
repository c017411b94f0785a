"""Attention masks for rows that hold several sequences, in the form that each attention implementation reads.

A token sees the earlier tokens of its own document that are in its context or in its own response, as far back as the
layer's window permits. Distances are computed from position ids, not from places in the row, so windows and chunks are
the same as if every sequence had a row to itself.

Shapes: R rows; T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bdpo_pl.data.packing import SequenceBatch
from bdpo_pl.forward.document_attention import DOCUMENTS, DocumentMasks, register
from bdpo_pl.models.causal_lm import CausalLM, ModelConfig

KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers for which there are masks, by transformers' names."""

TRAINING_ONLY = frozenset({"flex_attention", DOCUMENTS})
"""Attention implementations for the rows of training, which generation does not use."""

WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Kinds of attention that do not see all earlier tokens, and the option of a configuration that says how many."""

# Kinds of rotary embeddings whose angles do not change with the length of a row.
_STATIC_ROTATIONS = frozenset({None, "default", "linear", "llama3", "yarn"})

_RECOMPILATIONS = 64

Sees = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function of (row, query's place, key's place) that returns whether the query sees the key; broadcasts."""


def model_inputs(model: CausalLM, batch: SequenceBatch) -> dict[str, Any]:
    """Return the arguments for a call of `model` in which each sequence of `batch` sees only itself and its context.

    If ranks share the rows, tokens and positions are this rank's, and masks are those of whole rows.

    Raises:
        ValueError: the rows are shared, and the model's attention does not support such masks (see `why_not_shared`).
    """
    number, of = batch.stripe or (0, 1)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids[:, number::of], "use_cache": False}
    if not batch.masked:
        return inputs | {"attention_mask": batch.attention_mask}
    return inputs | {"attention_mask": _masks(model, batch), "position_ids": batch.position_ids[:, number::of]}


def why_not_shared(model: CausalLM) -> str | None:
    """Return why, by its configuration, `model` cannot read sequences in shared rows; None if no reason is known."""
    config = model.config.get_text_config()
    if getattr(model, "_is_stateful", False):
        return f"{type(model).__name__} carries a state from token to token, which cannot branch"
    if unknown := sorted(layer_kinds(config) - KINDS):
        return f"its {', '.join(unknown)} layers have no mask that could separate two responses"
    if getattr(config, "alibi", False):
        return "its ALiBi biases depend on distances in the row, not on positions"
    if config._attn_implementation not in _FORMS:
        return (
            f"{config._attn_implementation} attention takes no mask that could separate two responses; sdpa "
            "and flex_attention do"
        )
    return None


def depends_on_length(model: CausalLM) -> bool:
    """Return true if `model` may compute something else in long rows than in short ones.

    It may with windows, chunks and rotations that change with the length, and if its code is not part of transformers.
    """
    config = model.config.get_text_config()
    known = type(model).__module__.startswith("transformers.") and rotates_alike(config)
    return not known or layer_kinds(config) != {"full_attention"}


def rotates_alike(config: ModelConfig) -> bool:
    """Return true if the angles of the rotary embedding, if there is one, are the same in rows of any length."""
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return {part.get("rope_type") for part in parts} <= _STATIC_ROTATIONS


def reach(config: ModelConfig) -> int | None:
    """Return the number of tokens that the layers with the shortest windows or chunks see; None if all see all."""
    return min((getattr(config, WINDOWS[kind]) for kind in layer_kinds(config) if kind in WINDOWS), default=None)


def set_attention(model: CausalLM, implementation: str) -> None:
    """Switch the attention implementation of all layers of `model`."""
    if implementation == "flex_attention":
        allow_recompilation()
    elif implementation == DOCUMENTS:
        register()
    if model.config._attn_implementation != implementation:
        model.set_attn_implementation(implementation)


def _masks(model: CausalLM, batch: SequenceBatch) -> Any:
    """Return one mask, or one for each kind of layer if a model has several kinds."""
    config = model.config.get_text_config()
    if config._attn_implementation not in _FORMS:
        raise ValueError(f"shared rows need a mask, and {config._attn_implementation} attention takes none")
    form = _FORMS[config._attn_implementation]
    kinds = layer_kinds(config)
    masks = {kind: form(_sees(batch, kind, config), batch, model.dtype) for kind in kinds}
    return masks if len(masks) > 1 else masks.popitem()[1]


def layer_types(config: ModelConfig) -> list[str]:
    """Return the kind of attention of each layer, by transformers' names."""
    if kinds := getattr(config, "layer_types", None):
        return list(kinds)
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers


def layer_kinds(config: ModelConfig) -> set[str]:
    """Return the kinds of attention that the layers have, by transformers' names."""
    return set(layer_types(config))


def _sees(batch: SequenceBatch, kind: str, config: ModelConfig) -> Sees:
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
    """Return (R, 1, T, T) bool, True where the query sees the key.

    Padding sees padding, so that no row of the mask is empty.
    """
    R, T = batch.input_ids.shape
    device = batch.input_ids.device
    place = torch.arange(T, device=device)
    return sees(torch.arange(R, device=device).view(R, 1, 1), place.view(1, T, 1), place.view(1, 1, T)).unsqueeze(1)


def _additive(sees: Sees, batch: SequenceBatch, dtype: torch.dtype) -> Tensor:
    """Return (R, 1, T, T), 0 where the query sees the key and the lowest number of `dtype` elsewhere."""
    hidden = ~_dense(sees, batch, dtype)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min)


def _blocks(sees: Sees, batch: SequenceBatch, dtype: torch.dtype) -> Any:
    """Return a block mask, whose hidden blocks are not computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    R, T = batch.input_ids.shape
    device = batch.input_ids.device
    make = _compiled_block_mask() if device.type == "cuda" else create_block_mask
    return make(lambda row, _, query, key: sees(row, query, key), R, None, T, T, str(device))


def _each_document(sees: Sees, batch: SequenceBatch, dtype: torch.dtype) -> DocumentMasks:
    """Return the mask of each document of a single row without padding.

    Raises:
        ValueError: there are several rows, or padding.
    """
    if len(batch.documents) > 1 or (batch.documents < 0).any():
        raise ValueError(f"{DOCUMENTS} attention reads a single row without padding")
    row = torch.zeros(1, 1, dtype=torch.int64, device=batch.documents.device)
    sizes = torch.bincount(batch.documents[0]).tolist()
    documents, start = [], 0
    for size in sizes:
        place = torch.arange(start, start + size, device=row.device)
        documents.append((start, start + size, sees(row, place.view(-1, 1), place.view(1, -1)).view(1, 1, size, size)))
        start += size
    return DocumentMasks.of(documents)


@cache
def _compiled_block_mask() -> Callable[..., Any]:
    """Return PyTorch's `create_block_mask`, compiled once: compiled, it never stores a mask of all places."""
    from torch.nn.attention.flex_attention import create_block_mask

    allow_recompilation()
    return torch.compile(create_block_mask)


def allow_recompilation() -> None:
    """Raise the number of compilations of one function after which PyTorch silently runs it uncompiled.

    FlexAttention is compiled for each kind of layer, with and without gradients, with static and with dynamic shapes,
    and again for a reference with a different number of heads. The default of 8 can be reached, and beyond it all
    scores of all places are held in memory.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILATIONS)


_FORMS: dict[str, Callable[[Sees, SequenceBatch, torch.dtype], Any]] = {
    "sdpa": _dense,
    "eager": _additive,
    "flex_attention": _blocks,
    DOCUMENTS: _each_document,
}
"""Functions that build masks, by the name of the attention implementation."""
