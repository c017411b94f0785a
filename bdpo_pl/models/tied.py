"""Weights that several modules share, such as an embedding and an LM head: one parameter with several names."""

from __future__ import annotations

from torch import nn


def parameters_with_names(model: nn.Module) -> dict[int, tuple[list[str], nn.Parameter]]:
    """Return each parameter of `model` with all its names, by its identity."""
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter))[0].append(name)
    return found
