"""What is known of an architecture: its class, where its language model and its layers are, its soft-cap and scale."""

from __future__ import annotations

from typing import Any

from torch import nn


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a language model of `config` whole.

    What was saved as a model of images and text is loaded as one, though text is all that it will read: loaded as a
    language model alone, it would be exported without its vision tower.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    saved = (getattr(config, "architectures", None) or [None])[0]
    if whole is None or getattr(config, "is_encoder_decoder", False):
        return AutoModelForCausalLM
    if saved == whole or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def text_model(model: Any) -> Any:
    """The module of `model` that reads text: itself, or its language model where it has other parts."""
    config = model.config
    text = config.get_text_config()
    if text is config:
        return model
    # Read as the configuration has it: a vision tower's is another.
    found = [module for module in model.modules() if getattr(module, "config", None) is text]
    return found[0] if found else model


def decoder_layers(model: Any) -> nn.ModuleList | None:
    """The layers of `model`, in order; None if they cannot be told."""
    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    modules = text_model(model).modules()
    lists = [module for module in modules if isinstance(module, nn.ModuleList) and len(module) == number]
    # One alone: two of the same length could be anything.
    return lists[0] if len(lists) == 1 else None


def logit_transform(config: Any) -> tuple[float | None, float]:
    """Soft-cap and scale of the logits after the LM head: Gemma's, Cohere's and Granite's names for them."""
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0
    scale /= getattr(text, "logits_scaling", None) or 1.0
    return getattr(text, "final_logit_softcapping", None), scale
