"""The bytes of an optimiser's state, from a step on small matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bdpo_pl.training.optim import is_8bit
from bdpo_pl.training.optimizers import mark_kinds


def state_bytes(
    optimizer: Callable[[Any], torch.optim.Optimizer], hidden: int, others: int, dtype: torch.dtype, uneven: int = 0
) -> float:
    """Return the bytes of the optimiser state of `hidden` and `others` parameters.

    Args:
        optimizer: function that makes the optimiser.
        hidden: number of parameters in matrices between hidden states, for which some optimisers keep less.
        others: number of all other parameters.
        dtype: dtype of the parameters.
        uneven: number of `hidden` in weights whose parts keep no blocks, so that their state is not held in 8 bits.
    """
    model = nn.Module()
    # A resumed run has its random state again by now, and a draw here would change its dropout.
    with torch.random.fork_rng(devices=[]):
        # No smaller ones: bitsandbytes holds the state of a small matrix in 32 bits.
        model.hidden, model.table = nn.Linear(64, 64, bias=False), nn.Embedding(64, 64)
        mark_kinds(model)
        parameters = [p.requires_grad_() for p in model.to(dtype).parameters()]
        made = optimizer([{"params": parameters}])
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        made.step()
    saved = made.state_dict()
    order = [number for group in saved["param_groups"] for number in group["params"]]
    members = [parameter for group in made.param_groups for parameter in group["params"]]
    width = {
        id(parameter): sum(
            t.numel() * t.element_size()
            for name, t in _tensors(saved["state"].get(number, {}))
            # Sums of rows and columns are few in a matrix of a real size; scales of blocks are not.
            if t.shape == parameter.shape or name.startswith("absmax")
        )
        / parameter.numel()
        for number, parameter in zip(order, members, strict=True)
    }
    if not is_8bit(made):
        uneven = 0
    hidden, others = hidden - uneven, others + uneven
    return hidden * width[id(parameters[0])] + others * width[id(parameters[1])]


def _tensors(values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in values.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _tensors(value)
