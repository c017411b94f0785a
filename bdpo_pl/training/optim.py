"""Parameter groups and learning-rate schedules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim.optimizer import ParamsT

from bdpo_pl.errors import InputError
from bdpo_pl.parallel.fsdp2 import ShardedStrategy
from bdpo_pl.training.optimizers import chosen_name, is_vector, mark_kinds
from bdpo_pl.training.schedule_free import ScheduleFreeAdamW

LRSchedule = Literal["cosine", "linear", "constant"]

# In bfloat16, a weight of 0.02, a usual size, is 6e-5 from its next neighbour; a step of Adam is about the learning
# rate.
_SMALLEST_HALF_RATE = 1e-5
_SMALLEST_BESIDE_ADAPTERS = 6e-5


def parameter_groups(model: nn.Module, lr_ratio: float = 1.0) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups: matrices with the optimiser's weight decay, the rest without.

    The rest are vectors: norm scales and biases. Weight decay would pull them to zero, where a norm outputs nothing.

    Args:
        model: the policy.
        lr_ratio: learning rate of adapters' B matrices, divided by that of the rest (LoRA+). Unless it is 1, they form
            a third group. `scale_rates` applies it.
    """
    mark_kinds(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    second = {name for name, _ in trainable if lr_ratio != 1.0 and (".lora_B." in name or ".lora_embedding_B." in name)}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trainable if not is_vector(p) and name not in second]},
        {"params": [p for name, p in trainable if name in second], "lr_ratio": lr_ratio},
        {"params": [p for _, p in trainable if is_vector(p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def in_todays_groups(saved: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the saved state of an optimiser of all weights of `model` in the groups of `parameter_groups`.

    Earlier versions had biases of all experts among the matrices. A state in other groups is returned as it is.
    """
    today = [group["params"] for group in parameter_groups(model)]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    earlier = [[p for p in trainable if p.ndim >= 2], [p for p in trainable if p.ndim < 2]]
    if [len(group["params"]) for group in saved["param_groups"]] != [len(members) for members in earlier]:
        return saved
    number_of = {id(p): number for p, number in zip([*earlier[0], *earlier[1]], numbers, strict=True)}
    order = [number_of[id(p)] for members in today for p in members]
    state = {place: saved["state"][number] for place, number in enumerate(order) if number in saved["state"]}
    places = itertools.count()
    groups = [
        {**group, "params": [next(places) for _ in members]}
        for group, members in zip(saved["param_groups"], today, strict=True)
    ]
    return {**saved, "state": state, "param_groups": groups}


def scale_rates(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Multiply the learning rate of each group by its `lr_ratio`, once, before a schedule reads the rates."""
    for group in optimizer.param_groups:
        group["lr"] *= group.pop("lr_ratio", 1.0)
    return optimizer


def lr_lambda(schedule: LRSchedule, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate at each optimiser step: linear warm-up to 1, then the schedule to 0.

    Args:
        schedule: `cosine`, `linear`, or `constant` (which stays at 1).
        warmup_steps: number of warm-up steps; the first one already has a rate above 0.
        total_steps: number of steps in the whole run.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def with_schedule(
    optimizer: torch.optim.Optimizer, schedule: LRSchedule, warmup_steps: int, total_steps: int
) -> dict[str, Any]:
    """Return `optimizer` with the schedule of its learning rate over all optimiser steps, as Lightning takes them."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda(schedule, warmup_steps, total_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def adamw(params: ParamsT) -> torch.optim.Optimizer:
    """Make the default optimiser: fused AdamW at DPO's learning rate for full fine-tuning, 1e-6 (arXiv:2305.18290)."""
    return torch.optim.AdamW(params, lr=1e-6, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


class AdamW(torch.optim.AdamW):
    """`adamw` with its settings as options.

    Args:
        params: parameter groups.
        lr: learning rate; 1e-6 is DPO's for full fine-tuning, and adapters need about ten times as much.
        betas: decay rates of the means of the gradient and of its square.
        eps: number added to the root of the mean square.
        weight_decay: weight decay of matrices; norms and biases never decay.
        fused: update all parameters in one kernel.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool = True,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


def check_optimizer(
    make: Callable[[Any], torch.optim.Optimizer],
    schedule: LRSchedule,
    strategy: Strategy | None,
    *,
    whole: bool = True,
) -> None:
    """Check before anything is scored that the optimiser fits the schedule and the strategy.

    Args:
        make: function that makes the optimiser.
        schedule: schedule of the learning rate.
        strategy: strategy of the Trainer; None: each device holds whole weights.
        whole: true if whole models are trained, whose norms and biases are a second group.

    Raises:
        InputError: it does not.
    """
    groups: list[dict[str, Any]] = [{"params": [nn.Parameter(torch.zeros(2, 2))]}]
    if whole:
        groups.append({"params": [nn.Parameter(torch.zeros(2))], "weight_decay": 0.0})
    try:
        made = make(groups)
    except (ValueError, TypeError) as error:
        raise error if isinstance(error, InputError) else InputError(f"model.optimizer: {error}") from error
    if isinstance(made, ScheduleFreeAdamW) and schedule != "constant":
        raise InputError(
            f"model.optimizer is ScheduleFreeAdamW, whose average takes the place of a falling learning rate, but "
            f"model.lr_schedule is {schedule}: set it to constant"
        )
    if strategy is None or isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        return
    if reason := _why_not_split(made, strategy):
        raise InputError(f"model.optimizer is {chosen_name(made)}, {reason}: take AdamW")


def _why_not_split(optimizer: torch.optim.Optimizer, strategy: Strategy) -> str | None:
    """Return why `optimizer` cannot work on the parts of weights that `strategy` leaves on each device."""
    eighth = is_8bit(optimizer)
    # An attribute of the project's own optimisers; torch's work on parts by themselves.
    if not (eighth or getattr(optimizer, "takes_parts", False)):
        return None
    if not isinstance(strategy, ShardedStrategy):
        return "which works on whole weights and on FSDP2's parts of them, and this strategy splits them in another way"
    if strategy.splits_layers:
        return "which has not been tried on layers that devices share: set tensor_parallel_size to 1"
    if strategy.saves_parts:
        return "whose state save_distributed_checkpoint does not know: turn that off"
    if eighth and strategy.cpu_offload:
        return "whose steps have not been tried on the host: turn cpu_offload off"
    if eighth and getattr(optimizer, "is_paged", False):
        return "whose moves to the host have not been tried with parts of weights, unlike AdamW8bit"
    return None


def is_8bit(optimizer: torch.optim.Optimizer) -> bool:
    """Return true for an optimiser of bitsandbytes."""
    return type(optimizer).__module__.startswith("bitsandbytes")


def make_optimizer(
    make: Callable[[Any], torch.optim.Optimizer], model: nn.Module, lr_ratio: float
) -> torch.optim.Optimizer:
    """Make the optimiser of the trainable parameters of `model`; see `parameter_groups` for the arguments."""
    optimizer = scale_rates(make(parameter_groups(model, lr_ratio)))
    warn_of_lost_updates(optimizer)
    return optimizer


def warn_of_lost_updates(optimizer: torch.optim.Optimizer) -> None:
    """Warn if the learning rate is smaller than the rounding of the weights."""
    rate = max(group["lr"] for group in optimizer.param_groups)
    dtypes = {p.dtype for group in optimizer.param_groups for p in group["params"]}
    # Rates of adapters, which are in float32, are larger; modules that are trained whole beside them are not.
    smallest = _SMALLEST_BESIDE_ADAPTERS if torch.float32 in dtypes else _SMALLEST_HALF_RATE
    if rate < smallest and (half := dtypes & {torch.bfloat16, torch.float16}):
        rank_zero_warn(
            f"a learning rate of {rate:g} changes {half.pop()} weights by less than their rounding, so most "
            "updates are lost; hold the weights in float32 with --trainer.precision bf16-mixed"
        )
