"""Schedule-free AdamW, and which of its two points a model's weights are at: the one it steps from, or the average."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from bdpo_pl.parallel.state import parameters_of, reshard


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """Schedule-free AdamW (arXiv:2405.15682): an average of the steps in place of a falling learning rate.

    Steps are taken at z, gradients at y = (1 − β₁)·z + β₁·x, and x, the average of all z, is the model that one wants:

        z ← z − γ·(ĝ(y) + λ·y)    x ← (1 − c)·x + c·z    c = γₘ² / Σ γₘ²    ĝ = g / (√(v / (1 − β₂ᵏ)) + ε)

    with γₘ the largest rate so far. The weights are y while one trains and x while one validates or exports; y is kept
    meanwhile, because x is computed from it and has its rounding. A checkpoint has x as the weights and y beside them.
    The learning rate has a warm-up and is constant then: `--model.lr_schedule constant`.

    Args:
        params: parameter groups.
        lr: learning rate.
        betas: share of the average in y; decay rate of the mean of the gradient's square.
        eps: number added to the root of the mean square.
        weight_decay: weight decay of matrices; norms and biases never decay.
    """

    takes_parts = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not 0.0 < betas[0] < 1.0 or not 0.0 <= betas[1] < 1.0:
            raise ValueError(f"betas must be above 0 and below 1, got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._kept: dict[Tensor, Tensor] | None = None

    @property
    def is_averaged(self) -> bool:
        """True while the parameters are the average."""
        return self._kept is not None

    @torch.no_grad()
    def average(self) -> None:
        """Put the average into the parameters, to validate or export it."""
        if self._kept is None:
            self._kept = {}
            for parameter, state, beta in self._started():
                self._kept[parameter] = parameter.clone()
                parameter.copy_(averaged(parameter, state["z"], beta))

    @torch.no_grad()
    def go_on(self) -> None:
        """Put the point at which gradients are computed back into the parameters."""
        for parameter, y in (self._kept or {}).items():
            parameter.copy_(y)
        self._kept = None

    def _started(self) -> Iterator[tuple[Tensor, dict[str, Any], float]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if "z" in self.state.get(parameter, {}):
                    yield parameter, self.state[parameter], group["betas"][0]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step.

        Raises:
            RuntimeError: the parameters are the average.
        """
        if self.is_averaged:
            raise RuntimeError("the parameters are the average, from which no step is taken: call go_on() first")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate, (beta, beta2) = group["lr"], group["betas"]
            for y in group["params"]:
                if y.grad is None:
                    continue
                state = self.state[y]
                if not state:
                    state |= {"step": 0, "largest": 0.0, "sum": 0.0, "z": y.clone(), "exp_avg_sq": torch.zeros_like(y)}
                state["step"] += 1
                state["largest"] = max(state["largest"], float(rate))
                weight = state["largest"] ** 2
                state["sum"] += weight
                c = weight / state["sum"] if state["sum"] > 0.0 else 0.0
                square, z = state["exp_avg_sq"], state["z"]
                square.mul_(beta2).addcmul_(y.grad, y.grad, value=1.0 - beta2)
                moved = y.grad / (square / (1.0 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
                moved.add_(y, alpha=group["weight_decay"])
                # y of the new z and x, without x: y + c·(z − y) − γ·(1 − β₁·(1 − c))·moved.
                y.lerp_(z, c).add_(moved, alpha=-float(rate) * (1.0 - beta * (1.0 - c)))
                z.sub_(moved, alpha=float(rate))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state with y, because the weights in a checkpoint are x."""
        found = super().state_dict()
        members = list(parameters_of(self))
        kept = self._kept or {}
        found["state"] = {
            number: {**values, "y": kept.get(members[number], members[number].detach())}
            for number, values in found["state"].items()
        }
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, and put y, where training goes on, into the parameters."""
        super().load_state_dict(state_dict)
        self._kept = None
        for parameter, state, _ in self._started():
            parameter.copy_(state.pop("y"))


def averaged(y: Tensor, z: Tensor, beta: float) -> Tensor:
    """Return x, the average, of y and z."""
    return y.lerp(z, 1.0 - 1.0 / beta)


def averaged_weights(optimizers: Iterable[torch.optim.Optimizer]) -> dict[int, Tensor]:
    """Return the average for each parameter that is not at it, by the parameter's identity."""
    return {
        id(parameter): averaged(parameter.detach(), state["z"], beta)
        for optimizer in optimizers
        if isinstance(optimizer, ScheduleFreeAdamW) and not optimizer.is_averaged
        for parameter, state, beta in optimizer._started()
    }


def stay_at_average(optimizers: Iterable[torch.optim.Optimizer], model: nn.Module) -> None:
    """Put the average into the parameters of `model` for good: training is over."""
    for optimizer in _moving(optimizers):
        optimizer.average()
        reshard(model)


@contextmanager
def at_average(optimizers: Iterable[torch.optim.Optimizer], model: nn.Module) -> Iterator[None]:
    """Have the average in the parameters of `model` while this context is open, if it is not there already."""
    moved = _moving(optimizers)
    for optimizer in moved:
        optimizer.average()
        reshard(model)
    try:
        yield
    finally:
        for optimizer in moved:
            optimizer.go_on()
            reshard(model)


def _moving(optimizers: Iterable[torch.optim.Optimizer]) -> list[ScheduleFreeAdamW]:
    return [o for o in optimizers if isinstance(o, ScheduleFreeAdamW) and not o.is_averaged]
