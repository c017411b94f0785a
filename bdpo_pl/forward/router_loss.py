"""The auxiliary loss of mixtures of experts, which keeps their router from sending all tokens to a few experts.

Let f_e be the share of assignments that expert e of E gets, k of them per token, and P_e its mean probability, over all
tokens and layers. The loss is E · Σ_e f_e · P_e (Switch Transformers, arXiv:2101.03961, eq. 4; f sums to k as in
transformers). Its value is k where both are uniform, which is the minimum.

Shapes: R rows of T positions; E experts; k experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bdpo_kernels.checks import without_autocast
from bdpo_pl.data.packing import SequenceBatch
from bdpo_pl.errors import InputError
from bdpo_pl.models.causal_lm import CausalLM, ModelConfig

Routed = tuple[Tensor, Tensor]
"""The (R·T, E) logits of a router, and the (R·T, k) indices of the experts that it chose."""


_SILENT = ("doge", "ernie4_5_vl_moe_text")
"""Types of models with an auxiliary loss that record other logits than one of each expert, and no choice."""


def check_router(config: ModelConfig, coefficient: float, name: str) -> None:
    """Raise `InputError` if a model of `config` has no auxiliary loss, or `coefficient` is not a valid factor.

    Args:
        config: configuration of the model.
        coefficient: coefficient of the loss; 0 for none.
        name: name of the model, for messages.
    """
    if not 0.0 <= coefficient < float("inf"):
        raise InputError(f"model.router_aux_loss must be a number of at least 0, got {coefficient}")
    if coefficient and not hasattr(config.get_text_config(), "router_aux_loss_coef"):
        raise InputError(
            f"model.router_aux_loss is {coefficient}, but {name} ({config.model_type}) has no router that is trained "
            "with an auxiliary loss; set it to 0"
        )
    if coefficient and config.get_text_config().model_type in _SILENT:
        raise InputError(
            f"model.router_aux_loss is {coefficient}, but {name} ({config.model_type}) does not say which experts its "
            "routers choose; set it to 0"
        )


@contextmanager
def routed(model: CausalLM) -> Iterator[list[Routed]]:
    """Collect the decisions of each router of `model`, layer by layer, while the context is open.

    Raises:
        InputError: the routers of the model are not recognised.
    """
    found: list[Routed] = []

    def keep(module: nn.Module, args: object, output: tuple[Tensor, ...]) -> None:
        if len(output) == 3:
            logits, _, chosen = output
        elif _is_llama4(module):
            # It returns the scores of all experts and the logits, and chooses by the largest logits.
            _, logits = output
            chosen = logits.topk(int(module.top_k), dim=1).indices  # type: ignore[arg-type]
        else:
            raise _not_recognised(model)
        found.append((logits, chosen))

    handles = [module.register_forward_hook(keep) for module in _routers(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def balancing_loss(decisions: list[Routed], batch: SequenceBatch) -> Tensor:
    """Compute the loss over the tokens of `batch`, without padding.

    Args:
        decisions: decisions of each router, for the rows of `batch`.
        batch: batch that the model has read.
    """
    real = batch.attention_mask.flatten().float()
    E = decisions[0][0].shape[-1]
    chosen_sum, probability_sum = real.new_zeros(E), real.new_zeros(E)
    # Products under autocast would sum thousands of tokens in half precision.
    with without_autocast(real.device):
        for logits, chosen in decisions:
            probabilities = logits.float().softmax(dim=-1)
            probability_sum = probability_sum + real @ probabilities
            counted = torch.zeros_like(probabilities).scatter_(1, chosen, 1.0)
            chosen_sum = chosen_sum + real @ counted
        tokens = real.sum() * len(decisions)
        return E * (chosen_sum / tokens * (probability_sum / tokens)).sum()


def _routers(model: CausalLM) -> list[nn.Module]:
    recorders = [
        recorded["router_logits"]
        for module in model.modules()
        if (recorded := getattr(module, "_can_record_outputs", None)) and "router_logits" in recorded
    ]
    classes = tuple({getattr(recorder, "target_class", recorder) for recorder in recorders})
    routers = [module for module in model.modules() if classes and isinstance(module, classes)]
    if not routers:
        raise _not_recognised(model)
    return routers


def _is_llama4(router: nn.Module) -> bool:
    return type(router).__name__ == "Llama4Router"


def _not_recognised(model: CausalLM) -> InputError:
    return InputError(f"model.router_aux_loss: the routers of {type(model).__name__} are not recognised; set it to 0")
