"""Modules that are trained whole in addition to adapters: peft's `modules_to_save`."""

from __future__ import annotations

import torch
from torch import nn

from bdpo_pl.errors import InputError
from bdpo_pl.models.adapter_folder import AdapterFolder
from bdpo_pl.models.tied import parameters_with_names


def saved_parameters(model: nn.Module, modules: list[str]) -> set[str]:
    """Return the names of the parameters in the modules whose names end in one of `modules`.

    A tied parameter is returned with all its names.

    Raises:
        InputError: there is no such module, it holds adapters, or its weights are quantised.
    """
    found: set[int] = set()
    for wanted in modules:
        matched = [module for name, module in model.named_modules() if name.endswith(wanted)]
        parts = [(name, p) for module in matched for name, p in module.named_parameters()]
        if not parts or any(".lora_" in f".{name}" or not p.is_floating_point() for name, p in parts):
            raise InputError(
                f"model.lora.modules_to_save names {wanted!r}, but no module with such a name and plain weights was "
                "found: it is unknown, quantised, or has an adapter"
            )
        found |= {id(p) for _, p in parts}
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in found}


def check_tied(model: nn.Module, whole: set[str], adapter: AdapterFolder, keeps_tied: bool) -> None:
    """Raise `InputError` if an adapter trained one of two modules that share a weight in `model`."""
    for names, parameter in parameters_with_names(model).values():
        if names[0] not in whole:
            continue
        held = [name for name in names if name in adapter]
        values = [adapter.read(name, tuple(parameter.shape)) for name in held]
        apart = len(held) < len(names) and not keeps_tied
        if held and (apart or any(not torch.equal(values[0], value) for value in values)):
            raise InputError(
                f"{adapter.folder} holds {', '.join(held)} of {' and '.join(names)}, which are one weight in this "
                "model: the adapter took them apart. Merge it (PeftModel.merge_and_unload) into a model with "
                "tie_word_embeddings false, and train that"
            )
