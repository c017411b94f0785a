"""Adafactor at the learning rate that AdamW would have. In a file of its own: transformers' takes seconds to import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT
from transformers.optimization import Adafactor as _Adafactor

from bdpo_pl.parallel.state import as_part, local_part, local_ranges, parameters_of, whole


class Adafactor(_Adafactor):
    """Adafactor (arXiv:1804.04235) at a given learning rate: of a matrix's squares it keeps sums of rows and columns.

    The learning rate is that of AdamW, not relative to a weight's size, as in TRL's `--optim adafactor`.

    Args:
        params: parameter groups.
        lr: learning rate.
        weight_decay: weight decay of matrices; norms and biases never decay.
        clip_threshold: root mean square of an update from which on it is scaled down.
        decay_rate: exponent of the decay of the mean squares, below 0.
    """

    takes_parts = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-6,
        weight_decay: float = 0.0,
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            clip_threshold=clip_threshold,
            decay_rate=decay_rate,
            scale_parameter=False,
            relative_step=False,
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step. Where ranks hold parts of a matrix, sums and norms are those of the whole one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parts = [
            (parameter, parameter.grad, group)
            for group in self.param_groups
            for parameter in group["params"]
            if isinstance(parameter, DTensor) and parameter.grad is not None
        ]
        for parameter, _, group in parts:
            _adafactor_step_of_part(parameter, self.state[parameter], group)
            # Without a gradient it is passed over below.
            parameter.grad = None
        super().step()
        for parameter, grad, _ in parts:
            parameter.grad = grad
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, whose sums are in float32 whatever the dtype of the weights."""
        super().load_state_dict(state_dict)
        # That of torch rounds them to the dtype of the weights.
        for number, parameter in enumerate(parameters_of(self)):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[parameter][name] = value.to(self.state[parameter][name].device, copy=True)


def _adafactor_step_of_part(parameter: DTensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Take the step of `transformers.Adafactor` on this rank's part of a weight. All ranks call this.

    The state is that of the whole weight: sums of rows and columns are whole on each rank, because they are small.
    """
    assert isinstance(parameter.grad, DTensor)
    grad, ranges = local_part(parameter.grad).float(), local_ranges(parameter)
    # The root mean square of the weight is in the state, but only a rate that is relative to it reads it.
    state |= {"step": state.get("step", 0) + 1, "RMS": 0.0}
    share = state["step"] ** group["decay_rate"]
    square = grad.square() + group["eps"][0]
    if parameter.ndim > 1:
        split = as_part(square, parameter)
        means = []
        for name, dim in (("exp_avg_sq_row", -1), ("exp_avg_sq_col", -2)):
            found = whole(split.sum(dim)) / parameter.shape[dim]
            means.append(state.setdefault(name, torch.zeros_like(found)).lerp_(found, share))
        rows, columns = means[0] / means[0].mean(-1, keepdim=True), means[1]
        update = rows[ranges[:-1]].rsqrt().unsqueeze(-1) * columns[ranges[:-2] + ranges[-1:]].rsqrt().unsqueeze(-2)
    else:
        if "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros_like(parameter.grad, dtype=torch.float32)
        update = local_part(state["exp_avg_sq"]).lerp_(square, share).rsqrt()
    update.mul_(grad)
    size = (whole(as_part(update.square(), parameter).sum()) / parameter.numel()).sqrt()
    update.mul_(group["lr"] / (size / group["clip_threshold"]).clamp_(min=1.0))
    own = local_part(parameter)
    moved = own.float() * (1.0 - group["weight_decay"] * group["lr"]) - update
    own.copy_(moved)
