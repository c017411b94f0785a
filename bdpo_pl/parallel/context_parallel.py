"""Context parallelism: ranks of a group share the positions of each row, and exchange them for heads in attention.

Each of C ranks holds every C-th position (`bdpo_pl.data.stripes`). Before attention, it sends the other ranks its
positions of their heads, and gets all positions of its own heads; afterwards, the reverse (Ulysses, arXiv:2309.14509).
Attention therefore sees whole rows, with their masks, and everything else computes position by position.

Shapes: R rows; T positions; t = T/C positions of one rank; H heads; d size of a head; S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from bdpo_pl.errors import InputError
from bdpo_pl.models.causal_lm import ModelConfig

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    Mask = Tensor | BlockMask | None

REPLACED = ("sdpa", "flex_attention")
"""Names of the attention functions that are replaced while ranks share rows."""
_OF_HEADS = ("s_aux", "position_bias")
"""Arguments of attention functions that have a value for each head."""


@dataclass(frozen=True)
class ContextGroup:
    """The ranks that share the positions of the same rows.

    Attributes:
        group: process group of these ranks.
        rank: number of this rank in the group.
        size: number of ranks C.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def total(self, part: Tensor) -> Tensor:
        """Return the sum of `part` over the ranks, the same on each of them.

        All ranks compute the same loss from it. FSDP2 takes the mean of the gradients over ranks, each of which is only
        a part here, so `part` gets C times the gradient of the sum.
        """
        return _Total.apply(part, self)

    def whole_rows(self, positions: Tensor) -> Tensor:
        """Return (R, T, …) whole rows, without gradient, from the (R, t, …) positions of each rank."""
        parts = [torch.empty_like(positions) for _ in range(self.size)]
        dist.all_gather(parts, positions.contiguous(), group=self.group)
        return torch.stack(parts, dim=2).flatten(1, 2)

    def to_heads(self, states: Tensor) -> Tensor:
        """Return (R, H/C, T, d), all positions of this rank's heads, for (R, H, t, d), its positions of all heads."""
        R, H, t, d = states.shape
        sent = states.view(R, self.size, H // self.size, t, d).transpose(0, 1)
        # The position that a rank has at place i is i · C + its number.
        return _Exchange.apply(sent, self.group).permute(1, 2, 3, 0, 4).flatten(2, 3)

    def to_positions(self, states: Tensor) -> Tensor:
        """Return (R, t, H, d), this rank's positions of all heads, for (R, T, H/C, d), all positions of its heads."""
        R, T, h, d = states.shape
        sent = states.view(R, T // self.size, self.size, h, d).permute(2, 0, 1, 3, 4)
        return _Exchange.apply(sent, self.group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def check_context_parallel(config: ModelConfig, size: int, name: str) -> None:
    """Raise `InputError` unless the heads of a model of `config` can be divided among `size` ranks."""
    if size == 1:
        return
    H = getattr(config.get_text_config(), "num_attention_heads", None)
    if H is None or H % size:
        raise InputError(
            f"trainer.strategy.context_parallel_size is {size}, which does not divide the {H} attention heads of "
            f"{name}; set it to a divisor of them, or to 1"
        )


class SharedAttention:
    """An attention function of transformers that recognises a part of a row by the mask, which is for whole rows.

    Rows that a rank reads alone are left to the function that this one replaces. No switch is needed, so attention is
    the same again when activation checkpointing repeats it in the backward pass.

    Args:
        plain: function that is replaced.
        context: ranks that share rows.
    """

    def __init__(self, plain: Callable[..., Any], context: ContextGroup) -> None:
        self.plain = plain
        self.context = context

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Mask = None,
        **options: object,
    ) -> tuple[Tensor, None]:
        """Return (R, t, H, d) for queries (R, H, t, d), keys and values, as transformers' attention functions do.

        Raises:
            InputError: the layer has numbers for each head that are not divided.
        """
        t, C = query.shape[2], self.context.size
        if attention_mask is None or key.shape[2] != t or tuple(attention_mask.shape[-2:]) != (t * C, t * C):
            found: tuple[Tensor, None] = self.plain(module, query, key, value, attention_mask, **options)
            return found
        if given := [name for name in _OF_HEADS if options.get(name) is not None]:
            raise InputError(
                f"trainer.strategy.context_parallel_size is {C}, but attention of {type(module).__name__} has a number "
                f"for each head ({', '.join(given)}), which are not divided; set it to 1"
            )
        H, K = query.shape[1], key.shape[1]
        # If C does not divide the heads of keys and values, each is sent to all ranks with queries that read it.
        repeats = C // math.gcd(C, K)
        key, value = (states.repeat_interleave(repeats, dim=1) if repeats > 1 else states for states in (key, value))
        parts = (self.context.to_heads(states) for states in (query, key, value))
        output, _ = self.plain(_Heads(module, H // (K * repeats)), *parts, attention_mask, **options)
        return self.context.to_positions(output), None


class _Heads:
    """The attributes of an attention layer, with another number of queries for each key."""

    def __init__(self, module: nn.Module, groups: int) -> None:
        self._module = module
        self.num_key_value_groups = groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def share_attention(context: ContextGroup) -> None:
    """Register attention for rows that the ranks of `context` share, in place of transformers' own functions."""
    from transformers import AttentionInterface

    stop_sharing_attention()
    known = AttentionInterface()
    for name in REPLACED:
        AttentionInterface.register(name, SharedAttention(known[name], context))


def shares_attention() -> bool:
    """Return true if attention is registered for rows that ranks share."""
    from transformers import AttentionInterface

    known = AttentionInterface()
    return any(isinstance(known[name], SharedAttention) for name in REPLACED)


def stop_sharing_attention() -> None:
    """Register the functions again that `share_attention` has replaced, if it has."""
    from transformers import AttentionInterface

    known = AttentionInterface()
    for name in REPLACED:
        if isinstance(found := known[name], SharedAttention):
            AttentionInterface.register(name, found.plain)


class _Context(FunctionCtx):
    group: dist.ProcessGroup
    size: int


class _Exchange(torch.autograd.Function):
    """Part i of (C, …) goes to rank i, and is replaced by what that rank has for this one."""

    @staticmethod
    def forward(ctx: _Context, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(parts, group)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grad, ctx.group), None


def _exchanged(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    sent = parts.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, part: Tensor, context: ContextGroup) -> Tensor:
        ctx.size = context.size
        total = part.contiguous().clone()
        dist.all_reduce(total, group=context.group)
        return total

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.size, None
