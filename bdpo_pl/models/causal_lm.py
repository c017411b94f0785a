"""Types for the models of transformers: the attributes that this project uses.

mypy skips transformers, so its classes would count as Any. With these types, `make lint` finds a misspelled attribute,
a wrong type or a forgotten None. They are never instantiated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class ModelConfig(Protocol):
    """A configuration of transformers. A vision-language model's contains the configuration of its language model.

    Attributes that only some architectures have are read with `getattr` and a default.
    """

    model_type: str
    use_cache: bool
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    tie_word_embeddings: bool
    head_dim: int
    layer_types: list[str]
    sliding_window: int
    attention_chunk_size: int
    base_model_tp_plan: dict[str, str]
    _attn_implementation: str
    pad_token_id: int | None
    # Of classifiers.
    num_labels: int
    id2label: dict[int, str]
    problem_type: str | None

    def get_text_config(self) -> ModelConfig:
        """Return the language model's configuration."""


class Head(nn.Module):
    """An LM head, whole or split over ranks."""

    weight: nn.Parameter
    bias: Tensor | None


class Decoder(nn.Module):
    """The part of a Llama-style model below its LM head."""

    layers: nn.ModuleList
    embed_tokens: nn.Module


class CausalLM(nn.Module):
    """A causal language model."""

    config: ModelConfig
    generation_config: object
    dtype: torch.dtype
    hf_quantizer: object
    model: Decoder
    lm_head: Head
    all_tied_weights_keys: dict[str, str]
    _no_split_modules: list[str] | None

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding of tokens."""
        raise NotImplementedError

    def get_output_embeddings(self) -> Head | None:
        """Return the LM head; None if the model names none."""
        raise NotImplementedError

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Switch the attention implementation of every layer."""
        raise NotImplementedError

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        """Recompute activations in the backward pass."""
        raise NotImplementedError

    def generate(self, **options: object) -> Tensor:
        """Continue each row of `input_ids`, and return the rows with their continuation."""
        raise NotImplementedError

    def tie_weights(self) -> None:
        """Make the LM head share the embedding's weight, if the configuration says so."""
        raise NotImplementedError

    def save_pretrained(self, folder: Path) -> None:
        """Write weights and configuration."""
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        raise NotImplementedError
