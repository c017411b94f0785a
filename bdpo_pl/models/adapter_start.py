"""What adapters start from: zero effect, the strongest part of a weight (PiSSA, OLoRA), or an adapter that is there.

PiSSA and OLoRA take a part s·B₀·A₀ out of a weight W and train it: peft changes W to W − s·B₀·A₀. Here W stays as it
is, and the policy computes W + s·(B·A − B₀·A₀), with A₀ and B₀ frozen beside A and B: the same product and the same
gradients, but with the adapters off it is the original model, and before the first step it is that model exactly. It is
also what peft's conversion makes of such an adapter, which is how it is exported.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdpo_pl.errors import InputError
from bdpo_pl.models.adapter_folder import AdapterFolder

FROM_WEIGHT = re.compile(r"pissa|pissa_niter_[1-9]\d*|olora")
START = ".start"
_MODULE = re.compile(r"\.lora_(?:A|B|magnitude_vector|embedding_A|embedding_B)\.default")


class _DownFromStart(nn.Linear):
    """A beside its frozen start: what enters becomes (A·x, A₀·x)."""

    start: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """Compute both, one after the other in the last dimension."""
        return torch.cat([F.linear(input, self.weight), F.linear(input, self.start)], dim=-1)


class _UpFromStart(_DownFromStart):
    """B beside its frozen start: B·u − B₀·v, which is exactly zero where they are equal."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute the difference."""
        trained, start = input.chunk(2, dim=-1)
        return F.linear(trained, self.weight) - F.linear(start, self.start)


def keep_starts(model: nn.Module) -> None:
    """Give each adapter of `model`, of linear layers, a frozen second pair of matrices for its start.

    Raises:
        InputError: some adapter is not of a linear layer.
    """
    from peft.tuners.lora.layer import Linear, LoraLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if not isinstance(layer, Linear):
            raise InputError(
                f"model.lora.init takes its start from linear layers, and {name} is a {type(layer).__name__}; "
                "set it to zero, or name other target_modules"
            )
        for part, kind in ((layer.lora_A, _DownFromStart), (layer.lora_B, _UpFromStart)):
            old = part["default"]
            new = kind(old.in_features, old.out_features, bias=False, device="meta")
            new.weight = old.weight
            new.start = nn.Parameter(old.weight.detach().clone(), requires_grad=False)
            part["default"] = new


class Start:
    """The values that the adapters of a model start from.

    Args:
        init: `zero`, `pissa`, `pissa_niter_N` or `olora`.
        folder: an adapter to start from, in place of `init`.

    Raises:
        InputError: there is no such adapter.
    """

    def __init__(self, init: str, folder: str | None) -> None:
        self._init = init
        self.folder = None if folder is None else AdapterFolder(folder)
        self._last: tuple[str, tuple[Tensor, Tensor]] | None = None

    def value(self, model: nn.Module, name: str, shape: torch.Size, weight: Callable[[str], Tensor]) -> Tensor:
        """Compute the whole value of the parameter `name`, of an adapter of `model`.

        Args:
            model: with its adapters; it may be on the meta device.
            name: of the parameter.
            shape: of the parameter.
            weight: gives the whole base weight of a name.

        Raises:
            InputError: the rank is more than a weight has, or the adapter does not fit.
        """
        if self.folder is not None:
            return self.folder.read(name, tuple(shape))
        if ".lora_magnitude_vector." in name:
            return torch.linalg.norm(self._base(model, name, weight), dim=1)
        if self._init == "zero":
            return noise_or_zero(name, shape)
        module = _module_of(name)
        if self._last is None or self._last[0] != module:
            layer: Any = model.get_submodule(module)
            rank = shape[0] if ".lora_A." in name else shape[1]
            factors = _factors(self._init, self._base(model, name, weight), rank, layer.scaling["default"], module)
            self._last = module, factors
        # Of its own: a matrix is trained in place, and its start must not move with it.
        return self._last[1][0 if ".lora_A." in name else 1].clone()

    def _base(self, model: nn.Module, name: str, weight: Callable[[str], Tensor]) -> Tensor:
        """The (out, in) weight beside the adapter's parameter `name`, in float32."""
        module = _module_of(name)
        found = weight(f"{module}.base_layer.weight").detach().float()
        return found.T if model.get_submodule(module).fan_in_fan_out else found


def noise_or_zero(name: str, shape: torch.Size) -> Tensor:
    """Return what the adapter's matrix of this name starts from where it starts at zero effect.

    One of the two is zero; the other is noise as peft draws it, from a seed of its own name: the same on every rank and
    however the model is split.
    """
    value = torch.zeros(shape)
    seed = hashlib.sha256(f"{os.environ.get('PL_GLOBAL_SEED', 0)} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
    if ".lora_A." in name:
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    elif ".lora_embedding_B." in name:
        nn.init.normal_(value, generator=generator)
    return value


def _factors(init: str, weight: Tensor, rank: int, scaling: float, module: str) -> tuple[Tensor, Tensor]:
    """Compute A₀ (r, in) and B₀ (out, r); B₀·A₀ is the strongest part of `weight`, of PiSSA that over s."""
    if rank > min(weight.shape):
        raise InputError(
            f"model.lora.r is {rank}, but {module} has a rank of at most {min(weight.shape)}, of which "
            f"model.lora.init {init} takes its start; lower model.lora.r"
        )
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        up, down, each = q[:, :rank], r[:rank], 1.0
    else:
        if init == "pissa":
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            u, s, vh = u[:, :rank], s[:rank], vh[:rank]
        else:
            with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
                torch.manual_seed(0)
                u, s, v = torch.svd_lowrank(weight, rank, niter=int(init.rpartition("_")[2]))
            vh = v.T
        root = s.sqrt()
        up, down, each = u * root, root[:, None] * vh, math.sqrt(scaling)
    # The sign of a factor is the algorithm's choice; ranks must make the same one.
    sign = up.gather(0, up.abs().argmax(0, keepdim=True)).sign()
    return (down * sign.T / each).contiguous(), (up * sign / each).contiguous()


def _module_of(name: str) -> str:
    return _MODULE.split(name)[0]
