"""Export of trained adapters: alone, in peft's format, or merged into the weights of their base model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdpo_pl.models.adapter_folder import CONFIG, PREFIX, WEIGHTS, stored_name
from bdpo_pl.models.adapter_start import START
from bdpo_pl.models.adapters import LoraOptions, is_adapter, peft_package
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.saved_modules import saved_parameters
from bdpo_pl.models.tied import parameters_with_names


def export_adapter(base: CausalLM, options: LoraOptions, state: dict[str, Tensor], folder: Path) -> None:
    """Write the adapter alone to `folder`, in peft's layout: `PeftModel.from_pretrained` loads it on the base model.

    Args:
        base: model without adapters.
        options: options of the adapters.
        state: trained parameters; with PiSSA and OLoRA also the frozen starts of the adapters.
        folder: folder to write.
    """
    changes, state = _converted(options, state)
    whole = saved_parameters(base, options.saved_modules)
    # peft loads an embedding and an LM head that share a weight as two modules, so both are written.
    named = [names for names, _ in parameters_with_names(base).values() if names[0] in whole]
    tensors = {stored_name(name): value for name, value in state.items() if is_adapter(name)}
    modules = set(options.saved_modules)
    for names in named:
        value = next(state[name] for name in names if name in state)
        tensors |= {PREFIX + name: value.clone() for name in names}
        modules |= {name.rpartition(".")[0] for name in names} if len(names) > 1 else set()
    model = _with_adapters(base, options, {k: v for k, v in state.items() if is_adapter(k)}, changes)
    model.save_pretrained(folder, save_embedding_layers=False)
    _add_modules(folder, {name: value for name, value in tensors.items() if ".lora_" not in name}, modules)


def merged(base: CausalLM, options: LoraOptions, state: dict[str, Tensor]) -> CausalLM:
    """Merge the adapter in `state` into the weights of `base`, and return a model without adapters."""
    changes, state = _converted(options, state)
    _untie_adapted(base, state)
    own = {name: value for name, value in state.items() if not is_adapter(name)}
    found = base.load_state_dict(own, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    adapters = {name: value for name, value in state.items() if is_adapter(name)}
    return _with_adapters(base, options, adapters, changes).merge_and_unload()


def _converted(options: LoraOptions, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert adapters with frozen starts, s·(B·A − B₀·A₀), into plain adapters of twice the rank, as peft does.

    Returns:
        Changes of the configuration, and the converted state.
    """
    if options.init == "zero":
        return {}, state
    assert options.r is not None
    assert options.alpha is not None
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(START):
            continue
        start = state.get(name.removesuffix(".weight") + START)
        if start is None:
            converted[name] = value
        elif ".lora_A." in name:
            converted[name] = torch.cat([value, start])
        else:
            converted[name] = torch.cat([value, -start], dim=1)
    # r doubles, so alpha grows with it: the factor alpha / r, or alpha / √r, must stay the same.
    alpha = options.alpha * (math.sqrt(2.0) if options.rslora else 2)
    return {"r": 2 * options.r, "lora_alpha": alpha}, converted


def _with_adapters(base: CausalLM, options: LoraOptions, state: dict[str, Tensor], changes: dict[str, Any]) -> Any:
    model = peft_package().get_peft_model(base, options.config(base, **changes))
    found = model.load_state_dict({PREFIX + name: value for name, value in state.items()}, strict=False)
    left = [name for name in found.missing_keys if is_adapter(name)]
    assert not found.unexpected_keys, found.unexpected_keys
    assert not left, left
    return model


def _untie_adapted(base: CausalLM, state: dict[str, Tensor]) -> None:
    """Give the LM head its own copy of the embedding's weight, if they share it and an adapter changes one of them."""
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    names = {name for name, module in base.named_modules() if module is head or module is embedding}
    if not any(key.startswith(f"{name}.") for key in state if is_adapter(key) for name in names):
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False
    base.all_tied_weights_keys = {}


def _add_modules(folder: Path, tensors: dict[str, Tensor], modules: set[str]) -> None:
    """Add modules that were trained whole to the adapter in `folder`."""
    if not tensors:
        return
    from safetensors.torch import load_file, save_file

    save_file(load_file(folder / WEIGHTS) | tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["modules_to_save"] = sorted(modules)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
