"""Models without noise: dropout, dropped layers and router jitter are off in both the policy and its reference.

A preference loss compares two passes over the same tokens, and noise in either of them would look like a difference
between policy and reference.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

_Config = TypeVar("_Config")
_Model = TypeVar("_Model", bound=nn.Module)
_WORDS = ("dropout", "pdrop", "layerdrop", "drop_path", "droppath", "jitter")


def without_noise(config: _Config) -> _Config:
    """Set every dropout rate, layer-drop rate and jitter of `config` to zero, and return it.

    Nested configurations are included.

    Args:
        config: configuration of transformers.
    """
    seen: set[int] = set()

    def silence(values: object) -> None:
        if id(values) in seen:
            return
        seen.add(id(values))
        fields = values if isinstance(values, dict) else vars(values)
        for key, value in list(fields.items()):
            if isinstance(value, dict) or hasattr(value, "to_dict"):
                silence(value)
            elif isinstance(value, int | float) and not isinstance(value, bool) and any(w in str(key) for w in _WORDS):
                # Set in place, because a rate may also be in a dictionary.
                fields[key] = 0.0

    silence(config)
    return config


def silence_modules(model: _Model) -> _Model:
    """Set the rate of every dropout module to zero, whatever its source in the configuration, and return `model`."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model
