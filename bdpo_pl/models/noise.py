"""Models without noise: dropout, dropped layers and jittered routers are off in the policy and its reference alike.

A preference loss compares two passes over the same tokens, and noise in either of them would be read as a difference
between policy and reference.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_WORDS = ("dropout", "pdrop", "layerdrop", "drop_path", "droppath", "jitter")


def without_noise(config: Any) -> Any:
    """Set every dropout rate, dropped layer and jitter of `config` to zero, in nested configurations too; returns it.

    Args:
        config: a configuration of transformers.
    """
    seen: set[int] = set()

    def silence(values: Any) -> None:
        if id(values) in seen:
            return
        seen.add(id(values))
        fields = values if isinstance(values, dict) else vars(values)
        for key, value in list(fields.items()):
            if isinstance(value, dict) or hasattr(value, "to_dict"):
                silence(value)
            elif isinstance(value, int | float) and not isinstance(value, bool) and any(w in str(key) for w in _WORDS):
                # In place, since a rate may also be kept in a dictionary.
                fields[key] = 0.0

    silence(config)
    return config


def silence_modules(model: nn.Module) -> nn.Module:
    """Set the rate of every dropout module to zero, wherever the architecture took it from; returns `model`."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model
