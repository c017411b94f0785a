"""The state of a policy with adapters before training, which is its own reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bdpo_pl.models.adapters import LoraOptions, is_adapter
from bdpo_pl.models.causal_lm import CausalLM


@contextmanager
def adapters_off(model: CausalLM) -> Iterator[CausalLM]:
    """Switch the adapters of `model` off while the context is open.

    peft switches all matrices of an adapter to trainable with it, also frozen ones (the starts of PiSSA and OLoRA). No
    optimiser would clear their gradients, which would grow and shrink all others by clipping; so each gets back its own
    state.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, is_trained in trained.items():
            parameter.requires_grad_(is_trained)


class BeforeTraining:
    """The state of a policy with adapters before training, which is its reference.

    New adapters are switched off. Trained weights that existed before training (an adapter that training starts from,
    or a module that is trained whole) are replaced by a copy of their initial values.

    Args:
        model: policy before training.
        options: options of its adapters.
    """

    def __init__(self, model: CausalLM, options: LoraOptions) -> None:
        self._switches = options.adapter is None
        self._kept = {
            name: p.detach().clone()
            for name, p in model.named_parameters()
            if p.requires_grad and not (self._switches and is_adapter(name))
        }

    @contextmanager
    def of(self, model: CausalLM) -> Iterator[CausalLM]:
        """Put `model` back into its state before training while the context is open."""
        trained = {name: model.get_parameter(name) for name in self._kept}
        self._exchange(trained)
        try:
            if self._switches:
                with adapters_off(model):
                    yield model
            else:
                yield model
        finally:
            self._exchange(trained)

    def _exchange(self, trained: dict[str, nn.Parameter]) -> None:
        for name, parameter in trained.items():
            kept: Tensor = self._kept[name].to(parameter.device)
            self._kept[name], parameter.data = parameter.data, kept
        if trained:
            # Autocast caches cast copies of trained weights, and would continue to use those of the exchanged values.
            torch.clear_autocast_cache()
