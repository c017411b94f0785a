"""What is known of an architecture: where its layers are."""

from __future__ import annotations

from typing import Any

from torch import nn


def decoder_layers(model: Any) -> nn.ModuleList | None:
    """The layers of `model`, in order; None if they cannot be told."""
    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == number]
    # One alone: two of the same length could be anything.
    return lists[0] if len(lists) == 1 else None
