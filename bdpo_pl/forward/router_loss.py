"""The auxiliary loss of mixtures of experts, which keeps their router from sending all tokens to a few experts.

With f_e the share of assignments that expert e of E gets, k of them a token, and P_e its mean probability, over all
tokens and layers, it is E · Σ_e f_e · P_e (Switch Transformers, arXiv:2101.03961, eq. 4; with f summing to k as in
transformers). It is least, k, where both are uniform.

Shapes: R rows of T positions; E experts; k experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bdpo_pl.data.packing import SequenceBatch
from bdpo_pl.errors import InputError

Routed = tuple[Tensor, Tensor]
"""(R·T, E) logits of a router, and (R·T, k) which experts it chose."""


def check_router(config: Any, coefficient: float, name: str) -> None:
    """Raise `InputError` if a model of `config` has no auxiliary loss, or `coefficient` is no factor for one.

    Args:
        config: of the model.
        coefficient: of the loss; 0 for none.
        name: of the model, for messages.
    """
    if not 0.0 <= coefficient < float("inf"):
        raise InputError(f"model.router_aux_loss must be a number of at least 0, got {coefficient}")
    if coefficient and not hasattr(config.get_text_config(), "router_aux_loss_coef"):
        raise InputError(
            f"model.router_aux_loss is {coefficient}, but {name} ({config.model_type}) has no router that is trained "
            "with an auxiliary loss; set it to 0"
        )


@contextmanager
def routed(model: Any) -> Iterator[list[Routed]]:
    """While open, what each router of `model` decides is collected, layer by layer.

    Raises:
        InputError: the routers of the model cannot be told.
    """
    found: list[Routed] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        logits, _, chosen = output
        found.append((logits, chosen))

    handles = [module.register_forward_hook(keep) for module in _routers(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def balancing_loss(decisions: list[Routed], batch: SequenceBatch) -> Tensor:
    """The loss over the tokens of `batch`, padding left out.

    Args:
        decisions: of each router, for the rows of `batch`.
        batch: what the model has read.
    """
    real = batch.attention_mask.flatten().float()
    E = decisions[0][0].shape[-1]
    chosen_sum, probability_sum = real.new_zeros(E), real.new_zeros(E)
    for logits, chosen in decisions:
        probabilities = logits.float().softmax(dim=-1)
        probability_sum = probability_sum + real @ probabilities
        counted = torch.zeros_like(probabilities).scatter_(1, chosen, 1.0)
        chosen_sum = chosen_sum + real @ counted
    tokens = real.sum() * len(decisions)
    return E * (chosen_sum / tokens * (probability_sum / tokens)).sum()


def _routers(model: Any) -> list[nn.Module]:
    recorders = [
        recorded["router_logits"]
        for module in model.modules()
        if (recorded := getattr(module, "_can_record_outputs", None)) and "router_logits" in recorded
    ]
    classes = tuple({getattr(recorder, "target_class", recorder) for recorder in recorders})
    routers = [module for module in model.modules() if classes and isinstance(module, classes)]
    if not routers:
        raise InputError(f"model.router_aux_loss: the routers of {type(model).__name__} cannot be told; set it to 0")
    return routers
