"""LoRA: small trainable matrices beside the policy's frozen weights; with them switched off it is its own reference.

The matrices are peft's, put into the model where its linear layers are; the model itself keeps its class, so everything
that works on a model works on one with adapters.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from bdpo_pl.errors import InputError
from bdpo_pl.models.reach import unreached

Quantization = Literal["none", "nf4"]
_PEFT_PREFIX = "base_model.model."


@dataclass
class LoraOptions:
    """Low-rank adapters (arXiv:2106.09685), and QLoRA (arXiv:2305.14314) with `quantize: nf4`.

    Args:
        r: rank of the adapters.
        alpha: their output counts alpha / r times (alpha / √r with `rslora`).
        dropout: of what enters an adapter. Leave it at 0: the reference has none, and dropout adds noise to one side of
            the comparison that the loss is made of.
        target_modules: names of the layers that get an adapter, or `all-linear`: every linear layer but the LM head.
        rslora: the rank-stabilised factor.
        quantize: `nf4` holds the frozen weights in 4 bits, by bitsandbytes on a CUDA GPU; the reference is quantised
            alike, the exported model is not.

    Raises:
        InputError: a value out of range.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    rslora: bool = False
    quantize: Quantization = "none"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise InputError(f"model.lora.r must be at least 1, got {self.r}")
        if self.alpha <= 0:
            raise InputError(f"model.lora.alpha must be above 0, got {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"model.lora.dropout must be in [0, 1), got {self.dropout}")
        if self.quantize not in ("none", "nf4"):
            raise InputError(f"model.lora.quantize must be none or nf4, got {self.quantize!r}")


def quantization_config(options: LoraOptions | None) -> Any:
    """What transformers is told of the frozen weights' quantisation; None: there is none.

    Raises:
        InputError: it needs bitsandbytes and a CUDA GPU, and one is missing.
    """
    if options is None or options.quantize == "none":
        return None
    for missing, remedy in (
        (not torch.cuda.is_available(), "this process sees no CUDA GPU; set model.lora.quantize to none"),
        (
            importlib.util.find_spec("bitsandbytes") is None,
            'bitsandbytes is not installed; pip install "bdpo-pl[qlora]", or set model.lora.quantize to none',
        ),
    ):
        if missing:
            raise InputError(f"model.lora.quantize is {options.quantize}, but {remedy}")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def add_adapters(model: nn.Module, options: LoraOptions) -> nn.Module:
    """Put adapters into `model`, in place, and freeze the rest; they begin at zero effect.

    Each adapter's first matrix is drawn from a seed of its own name, the same on every rank and however the model is
    split; on the meta device it is left to `initial_value`.

    Raises:
        InputError: peft is not installed, or the model has no layer of the given names.
    """
    if options.dropout:
        rank_zero_warn(
            f"model.lora.dropout is {options.dropout}: the policy learns with noise that its reference does not have"
        )
    peft = _peft()
    try:
        peft.inject_adapter_in_model(_config(options, model), model)
    except ValueError as error:
        raise InputError(f"model.lora.target_modules {options.target_modules!r}: {error}") from error
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            # Adapters are small, and their updates are lost in half precision.
            parameter.data = parameter.data.float()
            if not parameter.is_meta:
                with torch.no_grad():
                    parameter.copy_(initial_value(name, parameter.shape))
    return model


def is_adapter(name: str) -> bool:
    """Whether the parameter of this name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def initial_value(name: str, shape: torch.Size) -> Tensor:
    """What the adapter's matrix of this name starts from: uniform noise for A, as peft draws it, and zero for B."""
    value = torch.zeros(shape)
    if ".lora_A." in name:
        seed = hashlib.sha256(f"{os.environ.get('PL_GLOBAL_SEED', 0)} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    return value


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """While open, `model` is its own reference."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def base_name(name: str) -> str:
    """The name that a parameter has in the model without adapters."""
    return name.replace(".base_layer.", ".")


def export_adapter(base: nn.Module, options: LoraOptions, state: dict[str, Tensor], folder: Path) -> None:
    """Write the adapter alone to `folder`, in peft's layout: `PeftModel.from_pretrained` loads it on the base model."""
    _with_state(base, options, state).save_pretrained(folder)


def merged(base: nn.Module, options: LoraOptions, state: dict[str, Tensor]) -> nn.Module:
    """`base` with the adapter of `state` added to its weights: a model without adapters."""
    return _with_state(base, options, state).merge_and_unload()


def _with_state(base: nn.Module, options: LoraOptions, state: dict[str, Tensor]) -> Any:
    model = _peft().get_peft_model(base, _config(options, base))
    found = model.load_state_dict({_PEFT_PREFIX + name: value for name, value in state.items()}, strict=False)
    left = [name for name in found.missing_keys if is_adapter(name)]
    assert not found.unexpected_keys, found.unexpected_keys
    assert not left, left
    return model


def _config(options: LoraOptions, model: nn.Module) -> Any:
    # Adapters of what text never reaches would get no gradient.
    excluded = sorted({name.rpartition(".")[0] for name in unreached(model)})
    return _peft().LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.target_modules,
        exclude_modules=excluded or None,
        use_rslora=options.rslora,
        task_type="CAUSAL_LM",
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise InputError('model.lora needs the package peft; pip install "bdpo-pl[lora]"') from None
    return peft
