"""Trials of a model that ranks hold in parts: one answer of all ranks, and no traces of a pass that failed.

The ranks compute together: if one chose another layout than the rest, they would wait for different parts of weights,
or take the bytes of one for those of another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bdpo_pl.errors import MachineError, first_line, is_out_of_memory
from bdpo_pl.models.precision import device_of


def largest(model: nn.Module, value: float) -> float:
    """Return the largest `value` of the ranks that hold parts of `model`; `value` itself if this rank holds all of it.

    All of these ranks call this.
    """
    if not _in_parts(model):
        return value
    found = torch.tensor(value, device=device_of(model))
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def with_less_memory(
    model: nn.Module, trial: Callable[[], str | None], less: Callable[[], str | None] | None, what: str, remedy: str
) -> str | None:
    """Return what `trial` objects to; without memory for it, what `less` does.

    Args:
        model: model that both call.
        trial: comparison that returns an objection, or None.
        less: the same with less memory; None: there is none.
        what: what is tried, as a noun phrase for the message.
        remedy: what to do without memory, as a sentence.

    Raises:
        MachineError: there is no memory for `trial`, and nothing less to try.
    """
    try:
        return trial()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if less is None or not may_try_less(model):
            raise MachineError(f"out of memory in the trial of {what}: {first_line(error)}. {remedy}") from error
    # Not in the handler, because the error holds the memory of the pass that failed.
    return less()


def may_try_less(model: nn.Module) -> bool:
    """Let `model` be called with fewer tokens after a lack of memory; return false if it cannot be.

    Of ranks that train parts of `model`, one may lack memory alone, and would wait for the others in another pass.
    """
    trained = any(p.requires_grad for p in model.parameters())
    return not (trained and _in_parts(model)) and recovers(model)


def _in_parts(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule) or any(isinstance(p, DTensor) for p in model.parameters())


def recovers(model: nn.Module) -> bool:
    """Let `model` be called again after a pass that failed; return false if it cannot be.

    FSDP2's modules stay in the middle of a backward pass that fails, and PyTorch before 2.13 cannot reset them.
    """
    if not isinstance(model, FSDPModule):
        return True
    reset = getattr(model, "reset_iter_state", None)
    if reset is not None:
        reset()
    return reset is not None
