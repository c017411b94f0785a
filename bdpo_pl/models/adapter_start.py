"""Initial values of adapters: no effect, the principal part of a weight (PiSSA, OLoRA), or an existing adapter.

PiSSA and OLoRA take a part s·B₀·A₀ out of a weight W and train it: peft changes W to W − s·B₀·A₀. Here W is unchanged,
and the policy computes W + s·(B·A − B₀·A₀), where A₀ and B₀ are frozen copies of the initial A and B. Product and
gradients are the same as peft's. But the model without its adapters is the original model, and before the first step
the model with them equals it exactly. peft's own conversion of such adapters has the same form, and they are exported
in it.
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
    """A with its frozen start A₀: maps x to (A·x, A₀·x)."""

    start: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """Compute both products, concatenated along the last dimension."""
        return torch.cat([F.linear(input, self.weight), F.linear(input, self.start)], dim=-1)


class _UpFromStart(_DownFromStart):
    """B with its frozen start B₀: maps (u, v) to B·u − B₀·v, exactly zero while A = A₀ and B = B₀."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute the difference."""
        trained, start = input.chunk(2, dim=-1)
        return F.linear(trained, self.weight) - F.linear(start, self.start)


def keep_starts(model: nn.Module) -> None:
    """Give each adapter of `model` a frozen second pair of matrices, which hold its start.

    Raises:
        InputError: an adapter belongs to a layer that is not linear.
    """
    from peft.tuners.lora.layer import Linear, LoraLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if not isinstance(layer, Linear):
            raise InputError(
                f"model.lora.init starts from the weights of linear layers, but {name} is a {type(layer).__name__}; "
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
        folder: folder of an adapter to start from, instead of `init`.

    Raises:
        InputError: there is no such adapter.
    """

    def __init__(self, init: str, folder: str | None) -> None:
        self._init = init
        self.folder = None if folder is None else AdapterFolder(folder)
        self._last: tuple[str, tuple[Tensor, Tensor]] | None = None

    def value(self, model: nn.Module, name: str, shape: torch.Size, weight: Callable[[str], Tensor]) -> Tensor:
        """Compute the whole value of the parameter `name`, which belongs to an adapter of `model`.

        Args:
            model: model with its adapters; it may be on the meta device.
            name: name of the parameter.
            shape: shape of the parameter.
            weight: function that returns the whole base weight of a given name.

        Raises:
            InputError: the rank of the adapters exceeds that of a weight, or the adapter in the folder does not fit.
        """
        if self.folder is not None:
            return self.folder.read(name, tuple(shape))
        if ".lora_magnitude_vector." in name:
            # One number for each output: the rows of a linear layer's weight, the columns of an embedding's.
            by_column = model.get_submodule(name.rpartition(".")[0]).fan_in_fan_out
            return torch.linalg.norm(self._whole(name, weight), dim=0 if by_column else 1)
        if self._init == "zero":
            return noise_or_zero(name, shape)
        module = _module_of(name)
        if self._last is None or self._last[0] != module:
            layer: Any = model.get_submodule(module)
            rank = shape[0] if ".lora_A." in name else shape[1]
            factors = _factors(self._init, self._base(model, name, weight), rank, layer.scaling["default"], module)
            self._last = module, factors
        # A copy, because the matrix is trained in place and its start must not change with it.
        return self._last[1][0 if ".lora_A." in name else 1].clone()

    def _base(self, model: nn.Module, name: str, weight: Callable[[str], Tensor]) -> Tensor:
        """Return, in float32, the (out, in) base weight to which the adapter with the parameter `name` belongs."""
        found = self._whole(name, weight)
        return found.T if model.get_submodule(_module_of(name)).fan_in_fan_out else found

    def _whole(self, name: str, weight: Callable[[str], Tensor]) -> Tensor:
        """Return that weight in float32 as it is stored."""
        return weight(f"{_module_of(name)}.base_layer.weight").detach().float()


def noise_or_zero(name: str, shape: torch.Size) -> Tensor:
    """Return the initial value of an adapter's matrix called `name`, if the adapter starts without effect.

    One of the two matrices is zero. The other is noise from peft's distribution. Its seed depends on its name, so the
    values are the same on every rank, however the model is split.
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
    """Compute A₀ (r, in) and B₀ (out, r): B₀·A₀ is the principal part of `weight`, with PiSSA divided by s."""
    if rank > min(weight.shape):
        raise InputError(
            f"model.lora.r is {rank}, but model.lora.init {init} starts from the weight of {module}, whose rank is at "
            f"most {min(weight.shape)}; lower model.lora.r"
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
    # The algorithm may return either sign of a factor, but all ranks must use the same one.
    sign = up.gather(0, up.abs().argmax(0, keepdim=True)).sign()
    return (down * sign.T / each).contiguous(), (up * sign / each).contiguous()


def _module_of(name: str) -> str:
    return _MODULE.split(name)[0]
