"""8-bit AdamW on the parts of weights that FSDP2 leaves on each rank, with the state that one device would have.

bitsandbytes holds the state of a weight in blocks of 256 numbers, each with a scale of its own. FSDP2 splits a weight
by rows, so the part of a rank is a stretch of the whole. Where every part begins at the beginning of a block, its
blocks are those of the whole weight: steps and checkpoints are those of one device, to the last bit. Where it does not,
there is no such state in 8 bits, and that of the whole weight is held in 32 bits on every rank. Scales are never
computed again from the numbers of a block: the most negative code is −0.993, not −1, so they would shrink.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim.optimizer import ParamsT

from bdpo_pl.errors import InputError
from bdpo_pl.parallel.state import as_part, local_part, local_ranges, parameters_of, whole

BLOCK = 256
"""Numbers in a block of the state, by bitsandbytes."""
SMALLEST = 4096
"""Numbers in the smallest weight whose state is in 8 bits, by bitsandbytes."""
_STATES, _SCALES = ("state1", "state2"), ("absmax1", "absmax2")


class Options(TypedDict, total=False):
    """Options of bitsandbytes' `AdamW8bit`."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def numbers_in_a_part(shape: torch.Size, ranks: int) -> int:
    """Return the numbers in the part of each rank but the last ones, of a weight that FSDP2 splits by rows."""
    return -(-shape[0] // ranks) * shape[1:].numel()


def keeps_blocks(parameter: Tensor, ranks: int | None = None) -> bool:
    """Return true if every rank's part of `parameter` begins at the beginning of a block.

    Args:
        parameter: parameter, whole or split.
        ranks: number of ranks. Default: those over which it is split.
    """
    if ranks is None:
        ranks = parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1
    return ranks == 1 or numbers_in_a_part(parameter.shape, ranks) % BLOCK == 0


class SplitAdamW8bit(torch.optim.Optimizer):
    """AdamW by bitsandbytes for weights that FSDP2 has split.

    The state of a parameter is that of this rank's part: plain tensors, as bitsandbytes holds them.

    Args:
        params: parameter groups.
        in_32_bits: parameters whose state is held in 32 bits whatever their size: embeddings.
        options: options of bitsandbytes' `AdamW8bit`.
    """

    def __init__(self, params: ParamsT, in_32_bits: Iterable[Tensor], **options: Unpack[Options]) -> None:
        super().__init__(params, dict(options))
        wide = {id(parameter) for parameter in in_32_bits}
        self._parts = {id(p): nn.Parameter(local_part(p.detach()), requires_grad=False) for p in parameters_of(self)}
        groups = [{**group, "params": [self._parts[id(p)] for p in group["params"]]} for group in self.param_groups]
        self._inner = plain_adamw(groups, **options)
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            group.update({name: value for name, value in inner.items() if name not in group})
        for parameter in parameters_of(self):
            eighth = id(parameter) not in wide and parameter.numel() >= SMALLEST and keeps_blocks(parameter)
            # By the size of the whole weight, not by that of the part.
            choice = {"optim_bits": 8 if eighth else 32, "min_8bit_size": 0}
            self._inner.mng.override_config([self._parts[id(parameter)]], key_value_dict=choice)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take a step of each part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for i, (group, inner) in enumerate(zip(self.param_groups, self._inner.param_groups, strict=True)):
            inner.update({name: value for name, value in group.items() if name != "params"})
            for j, parameter in enumerate(group["params"]):
                part = self._parts[id(parameter)]
                part.data = local_part(parameter.detach())
                # Else the step would be taken on a copy.
                assert part.is_contiguous()
                part.grad = None if parameter.grad is None else local_part(parameter.grad)
                if parameter in self.state:
                    self._inner.state[part] = self.state[parameter]
                elif part.grad is not None:
                    self._inner.init_state(inner, part, i, j)
                    self.state[parameter] = self._inner.state[part]
                    _check_blocks(part, self.state[parameter])
                if part.numel() == 0 and part.grad is not None:
                    # A rank without a row of this weight.
                    self._inner.state[part]["step"] += 1
                    part.grad = None
        self._inner.step()
        for part in self._parts.values():
            part.grad = None
        return loss

    def whole_values(self, parameter: Tensor, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of the whole `parameter`, as one device has it. All ranks call this."""
        found = dict(values)
        if not isinstance(parameter, DTensor):
            return found
        mesh = parameter.device_mesh
        for name in _STATES:
            found[name] = whole(as_part(values[name], parameter))
        for name in (name for name in _SCALES if name in values):
            blocks = -(-numbers_in_a_part(parameter.shape, mesh.size()) // BLOCK)
            # Those of the last ranks are fewer.
            padded = values[name].new_zeros(blocks)
            padded[: len(values[name])] = values[name]
            joined = DTensor.from_local(padded, mesh, [Shard(0)], run_check=False).full_tensor()
            found[name] = joined[: -(-parameter.numel() // BLOCK)]
        return found

    def part_values(self, parameter: Tensor, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return this rank's part of the state of the whole `parameter`, of whatever number of ranks."""
        found = _flat(values)
        if not isinstance(parameter, DTensor):
            return found
        _check_blocks(parameter, found)
        device, ranges = local_part(parameter).device, local_ranges(parameter)
        start = ranges[0].start * parameter.shape[1:].numel()
        first, last = start // BLOCK, -(-(start + local_part(parameter).numel()) // BLOCK)
        if "absmax1" in found and not keeps_blocks(parameter):
            return {"step": found["step"], **_in_32_bits(parameter, found, start)}
        for name, value in found.items():
            if isinstance(value, Tensor):
                own = value[ranges] if name in _STATES else value[first:last] if name in _SCALES else value
                # Never the memory of the file.
                found[name] = own.to(device, copy=True)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this rank's parts, which `part_values` has made."""
        # That of torch would turn codes into floating-point numbers.
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        self.state.clear()
        for number, parameter in enumerate(parameters_of(self)):
            if number in state_dict["state"]:
                self.state[parameter] = dict(state_dict["state"][number])


def _check_blocks(parameter: Tensor, state: Mapping[str, Any]) -> None:
    """Raise `InputError` if the state of `parameter` is in blocks of another size."""
    if any(name in state and len(state[name]) != -(-parameter.numel() // BLOCK) for name in _SCALES):
        raise InputError(
            f"model.optimizer: the 8-bit state is not in blocks of {BLOCK} numbers; with FSDP2 take a version of "
            "bitsandbytes that has them, or AdamW"
        )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state as bitsandbytes steps on it; when it saves, it wraps tensors in a dictionary of their own."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= value if isinstance(value, Mapping) else {name: value}
    return found


def _in_32_bits(parameter: DTensor, values: Mapping[str, Any], start: int) -> dict[str, Tensor]:
    """Return this rank's part of the state in 32 bits, from codes and scales of the whole weight."""
    part = local_part(parameter)
    first, last = start // BLOCK, -(-(start + part.numel()) // BLOCK)
    found = {}
    for state, scales, table in zip(_STATES, _SCALES, ("qmap1", "qmap2"), strict=True):
        codes = values[state].flatten()[first * BLOCK : last * BLOCK].long()
        numbers = values[table][codes] * values[scales][first:last].repeat_interleave(BLOCK)[: len(codes)]
        skipped = start - first * BLOCK
        found[state] = numbers[skipped : skipped + part.numel()].view(part.shape).to(part.device)
    return found


def plain_adamw(params: ParamsT, *, is_paged: bool = False, **options: Unpack[Options]) -> Any:
    """Make bitsandbytes' AdamW with a manager of its own: the one of the process would apply exceptions to others."""
    made = importlib.import_module("bitsandbytes").optim.AdamW8bit(params, is_paged=is_paged, **options)
    made.mng = object.__new__(type(made.mng))
    made.mng.initialize()
    return made
