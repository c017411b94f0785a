"""Weights that several modules share, such as an embedding and an LM head: one parameter with several names."""

from __future__ import annotations

from torch import Tensor, nn


def parameters_with_names(model: nn.Module) -> dict[int, tuple[list[str], nn.Parameter]]:
    """Return each parameter of `model` with all its names, by its identity."""
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter))[0].append(name)
    return found


def shared_where_tied(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return `state` with one tensor for all names of a parameter of `model`, so that a file stores it once."""
    found = dict(state)
    for names, _ in parameters_with_names(model).values():
        held = [name for name in names if name in state]
        found.update((name, state[held[0]]) for name in held[1:])
    return found
