"""Filling a model on the meta device with weights from safetensors files: this rank's part of each, or all, mapped.

Mapped weights stay in the operating system's page cache of the file, which all processes of a machine share. A weight
whose dtype differs from that in the file is copied in each process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdpo_pl.errors import InputError
from bdpo_pl.models.adapter_start import Start
from bdpo_pl.models.adapters import base_name, is_adapter
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.loading import ModelSource, hold_products_in, load_config, model_class
from bdpo_pl.models.tied import parameters_with_names
from bdpo_pl.parallel.state import split_like
from bdpo_pl.parallel.weight_files import WeightFiles


@dataclass(frozen=True)
class MappedModel:
    """A frozen model on the CPU whose weights are mapped from its files.

    Attributes:
        model: the model.
        shared: bytes that all processes of a machine share.
        copied: bytes that each process holds separately, because the file has another dtype or stores them in parts.
    """

    model: CausalLM
    shared: int
    copied: int


def mapped_model(source: ModelSource, dtype: torch.dtype, products: torch.dtype | None = None) -> MappedModel:
    """Build the model of `source` for inference only, with weights mapped from its files.

    Args:
        source: location of a model in safetensors files.
        dtype: dtype of the weights.
        products: dtype in which autocast multiplies, for the weights of linear layers; None: `dtype`.

    Raises:
        InputError: its files cannot be mapped, or the model cannot be built without them.
    """
    with torch.device("meta"):
        model = model_class(source, load_config(source), dtype)
    model.config.use_cache = False
    files = WeightFiles.of(source)
    files.take_names_of(model)
    if products is not None:
        hold_products_in(model, products)
    cpu = torch.device("cpu")
    shared, copied = 0, 0
    with files:
        fill(model, files, cpu, None)
        for names, parameter in parameters_with_names(model).values():
            size = parameter.numel() * parameter.element_size()
            # A weight that the file stores in the same dtype is not copied.
            if files.stored_dtype(names) == parameter.dtype:
                shared += size
            else:
                copied += size
    compute_buffers(model, cpu)
    return MappedModel(model.requires_grad_(False).eval(), shared, copied)


def fill(
    model: nn.Module,
    files: WeightFiles,
    device: torch.device,
    start: Start | None,
    *,
    buffers: torch.device | None = None,
) -> None:
    """Give every parameter and stored buffer its local part of the weights; tied ones remain one tensor.

    Args:
        model: model without weights, with its adapters.
        files: weight files of the base model.
        device: device of the parts.
        start: initial values of the adapters, if there are any.
        buffers: device of the stored buffers. Default: that of the parts.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    aliases: dict[int, list[str]] = {}
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    stored = set(model.state_dict())
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in stored}
    for name, tensor in tensors.items():
        aliases.setdefault(id(tensor), []).append(name)
    state: dict[str, Tensor] = {}
    for names in aliases.values():
        old = tensors[names[0]]
        read = None if start is None else _started(model, files, names, shapes, start)
        weight = isinstance(old, nn.Parameter)
        place = device if weight or buffers is None else buffers
        value = split_like(old, read or _stored(files, names, old.shape), place)
        if weight:
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        state |= dict.fromkeys(names, value)
    model.load_state_dict(state, assign=True)


def _stored(files: WeightFiles, names: list[str], shape: torch.Size) -> Callable[[tuple[slice, ...]], Tensor]:
    """Return a function that reads a part of the base model's tensor stored under one of `names`."""
    return lambda ranges: files.read([base_name(name) for name in names], tuple(shape), ranges)


def _started(
    model: nn.Module, files: WeightFiles, names: list[str], shapes: dict[str, torch.Size], start: Start
) -> Callable[[tuple[slice, ...]], Tensor] | None:
    """Return a function that reads a part of an adapter's tensor; None if the tensor belongs to the base model."""
    name = names[0]

    def whole(base: str) -> Tensor:
        shape = shapes[base]
        return files.read([base_name(base)], tuple(shape), tuple(slice(0, size) for size in shape))

    if is_adapter(name):
        return lambda ranges: start.value(model, name, shapes[name], whole)[ranges]
    if start.folder is not None and (held := [one for one in names if one in start.folder]):
        values = [start.folder.read(one, tuple(shapes[one])) for one in held]
        return lambda ranges: values[0][ranges]
    return None


def compute_buffers(model: CausalLM, device: torch.device) -> None:
    """Fill the buffers that no file stores (those of rotary embeddings) by the model's own initialisation."""
    # All tensors are marked as initialised; otherwise an embedding with a scale would get new random weights too.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in model.modules():
        buffers = module._buffers
        old = {name: buffer for name in module._non_persistent_buffers_set if (buffer := buffers.get(name)) is not None}
        for name, buffer in old.items():
            fill = torch.nan if buffer.is_floating_point() else 0
            buffers[name] = torch.full(buffer.shape, fill, dtype=buffer.dtype, device=device)
        if old:
            model._init_weights(module)
        for name in old:
            made = buffers[name]
            if made is None or not torch.isfinite(made).all():
                raise InputError(
                    f"{type(model).__name__} cannot be built in parts: nothing computes its buffer {name} of "
                    f"{type(module).__name__}; use ddp"
                )
