"""Optimisers with less state than AdamW, at the learning rate that AdamW would have: Muon, 8-bit AdamW."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from bdpo_pl.errors import InputError
from bdpo_pl.parallel.state import as_part, local_part, local_ranges, parameters_of, whole
from bdpo_pl.training.split_8bit import Options, SplitAdamW8bit, plain_adamw

_TABLE = "_bdpo_pl_is_a_table"
_VECTORS = "_bdpo_pl_is_of_vectors"
_CHOSEN = "_bdpo_pl_chosen"


def chosen_name(optimizer: torch.optim.Optimizer) -> str:
    """Return the name of the class that was asked for `optimizer`, which may be of another that this one makes."""
    return str(getattr(optimizer, _CHOSEN, type(optimizer).__name__))


def mark_kinds(model: nn.Module) -> None:
    """Mark tables and biases, which `is_hidden_matrix` and `is_vector` tell from matrices between hidden states.

    Tables are the weights of embeddings and of the LM head, and their adapters' factors that have an axis of tokens.
    Biases may have an axis of experts.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    if head is not None:
        tables += [head, *getattr(head, "lora_B", nn.ModuleDict()).values()]
    marked = [parameter for module in tables for parameter in module.parameters(recurse=False)]
    marked += [parameter for name, parameter in model.named_parameters() if ".lora_embedding_A." in name]
    for parameter in marked:
        setattr(parameter, _TABLE, True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            setattr(parameter, _VECTORS, True)


def is_hidden_matrix(parameter: torch.Tensor) -> bool:
    """Return true for a matrix between hidden states: no embedding, no LM head, no vector, no vectors of experts."""
    return parameter.ndim == 2 and not getattr(parameter, _TABLE, False) and not is_vector(parameter)


def is_vector(parameter: torch.Tensor) -> bool:
    """Return true for norms and biases, also for those of all experts in one parameter (gpt-oss)."""
    return parameter.ndim < 2 or getattr(parameter, _VECTORS, False)


class Muon(torch.optim.Optimizer):
    """Muon for the matrices between hidden states, and AdamW for all else, in one optimiser.

    Muon (https://kellerjordan.github.io/posts/muon/) makes the mean of the gradients orthogonal before each step. Its
    steps are scaled to the size of AdamW's (arXiv:2502.16982, 0.2·√max(rows, columns)), so that both have one learning
    rate. Embeddings, the LM head, norms, biases and the fused experts of mixtures go to AdamW.

    Args:
        params: parameter groups.
        lr: learning rate of both.
        momentum: decay rate of Muon's mean of the gradients.
        nesterov: look one step ahead along that mean.
        weight_decay: weight decay of matrices; norms and biases never decay.
        betas: decay rates of AdamW's means of the gradient and of its square.
        eps: number added to the root of AdamW's mean square.
    """

    takes_parts = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-6,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        hidden, others = _split(params)
        shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self._parts: list[torch.optim.Optimizer] = []
        if hidden:
            self._parts.append(
                torch.optim.Muon(hidden, **shared, momentum=momentum, nesterov=nesterov, adjust_lr_fn="match_rms_adamw")
            )
        if others:
            self._parts.append(torch.optim.AdamW(others, **shared, betas=betas, eps=eps, fused=True))
        self._sizes = [len(part.param_groups) for part in self._parts]
        # The options of both in every group: a resumed run compares those of the first.
        kept = {"momentum": momentum, "nesterov": nesterov, "betas": betas, "adam_eps": eps}
        made = [{**kept, **group} for part in self._parts for group in part.param_groups]
        super().__init__(made, shared)
        self._share()

    def _share(self) -> None:
        """Let the two optimisers have their part of this one's groups, and its state."""
        start = 0
        for part, size in zip(self._parts, self._sizes, strict=True):
            part.param_groups = self.param_groups[start : start + size]
            part.state = self.state
            start += size

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            if isinstance(part, torch.optim.Muon) and any(isinstance(p, DTensor) for p in parameters_of(part)):
                self._step_of_parts(part)
            else:
                part.step()
        return loss

    def _step_of_parts(self, part: torch.optim.Muon) -> None:
        """Take Muon's step where ranks hold parts of each matrix, which is gathered, one at a time."""
        for group in part.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, grad = self.state[parameter], local_part(parameter.grad)
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                mean = local_part(state["momentum_buffer"])
                mean.lerp_(grad, 1 - group["momentum"])
                ahead = grad.lerp(mean, group["momentum"]) if group["nesterov"] else mean
                # A step from zero, without mean and decay: an orthogonal matrix at the rate of this one's shape. Parts
                # on the host are gathered on the device, whose products take less time.
                gathered = ahead
                if isinstance(parameter, DTensor):
                    gathered = whole(as_part(ahead, parameter).to(parameter.device_mesh.device_type))
                moved = nn.Parameter(torch.zeros_like(gathered, dtype=parameter.dtype))
                moved.grad = gathered
                torch.optim.Muon(
                    [moved],
                    lr=group["lr"],
                    weight_decay=0.0,
                    momentum=0.0,
                    nesterov=False,
                    adjust_lr_fn="match_rms_adamw",
                ).step()
                own = local_part(parameter)
                own.mul_(1 - group["lr"] * group["weight_decay"]).add_(moved[local_ranges(parameter)].to(own.device))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both."""
        super().load_state_dict(state_dict)
        self._share()


def _split(params: ParamsT) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the groups of hidden matrices and those of the rest; a group of `params` may be in both, divided."""
    groups: list[Any] = list(params)
    if not groups or not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    parts: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for group in groups:
        members = [member[1] if isinstance(member, tuple) else member for member in group["params"]]
        for hidden, part in parts.items():
            if chosen := [p for p in members if is_hidden_matrix(p) == hidden]:
                part.append({**group, "params": chosen})
    return parts[True], parts[False]


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose state is held in 8 bits, by bitsandbytes (arXiv:2110.02861); embeddings' state is held in 32.

    Args:
        params: parameter groups.
        lr: learning rate.
        betas: decay rates of the means of the gradient and of its square.
        eps: number added to the root of the mean square.
        weight_decay: weight decay of matrices; norms and biases never decay.
    """

    _paged = False

    def __new__(  # noqa: D102 - as the class
        cls,
        params: ParamsT,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> Any:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise InputError("8-bit AdamW needs bitsandbytes: pip install 'bdpo-pl[qlora]'")
        groups: Any = list(params)
        members = [p for g in groups for p in (g["params"] if isinstance(g, dict) else [g])]
        tables = [p for p in members if getattr(p, _TABLE, False)]
        options: Options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        made: Any
        if any(isinstance(p, DTensor) for p in members):
            made = SplitAdamW8bit(groups, tables, **options)
        else:
            made = plain_adamw(groups, is_paged=cls._paged, **options)
            made.mng.override_config(tables, "optim_bits", 32)
        setattr(made, _CHOSEN, cls.__name__)
        return made


class PagedAdamW8bit(AdamW8bit):
    """`AdamW8bit` whose state moves to the machine's memory when the GPU's is short.

    Args:
        params: parameter groups.
        lr: learning rate.
        betas: decay rates of the means of the gradient and of its square.
        eps: number added to the root of the mean square.
        weight_decay: weight decay of matrices; norms and biases never decay.
    """

    _paged = True
