"""The last layer's MLP at scored positions only, because no other outputs of this layer are read.

After the last attention, the hidden state of a position does not influence any other, and only those that predict a
scored token reach the LM head. Skipping the other positions saves most of a layer if prompts are long.

Shapes: R rows; T positions; U positions to keep; D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bdpo_pl.data.packing import SequenceBatch
from bdpo_pl.models.architectures import decoder_layers
from bdpo_pl.models.causal_lm import CausalLM


@contextmanager
def scored_positions_only(model: CausalLM, batch: SequenceBatch) -> Iterator[None]:
    """Run the last layer's MLP of `model` at the scored positions of `batch` only, while the context is open.

    The MLP's outputs at other positions are zeros.

    Nothing is changed if that is not known to be correct, or if temporary hooks would cause errors: for models whose
    last layer has no plain MLP, under gradient checkpointing (which runs the layer again later) and for compiled
    layers.

    Raises:
        RuntimeError: the layer runs more than once in a forward pass.
    """
    mlp = _last_mlp(model)
    if mlp is None:
        yield
        return
    shape: list[torch.Size] = []

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if shape:
            raise RuntimeError(f"{type(model).__name__} runs its last layer more than once")
        hidden, *rest = args
        shape.append(hidden.shape)
        return (hidden.flatten(0, 1).index_select(0, batch.scored).unsqueeze(0), *rest)

    def put_back(_: nn.Module, __: tuple[object, ...], output: Tensor) -> Tensor:
        R, T = shape[0][:2]
        rows = output.new_zeros(R * T, output.shape[-1])
        return rows.index_copy(0, batch.scored, output[0]).view(R, T, -1)

    handles = [mlp.register_forward_pre_hook(select), mlp.register_forward_hook(put_back)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _last_mlp(model: CausalLM) -> nn.Module | None:
    layers = decoder_layers(model) if hasattr(model, "config") else None
    if not layers:
        return None
    last = layers[-1]
    if last._compiled_call_impl is not None or getattr(last, "gradient_checkpointing", False):
        return None
    mlp = getattr(last, "mlp", None)
    return mlp if isinstance(mlp, nn.Module) and _is_position_wise(mlp) else None


def _is_position_wise(mlp: nn.Module) -> bool:
    """Return true if `mlp` maps one tensor to one tensor, and contains only products and norms.

    Mixtures of experts are not of this kind (gpt-oss's also returns its router's scores), nor is BLOOM's, which adds
    the residual.
    """
    from transformers.pytorch_utils import Conv1D

    parameters = list(inspect.signature(type(mlp).forward).parameters.values())[1:]
    if len(parameters) != 1 or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return False
    return all(
        isinstance(module, nn.Linear | Conv1D | nn.LayerNorm) or type(module).__name__.endswith("Norm")
        for module in mlp.modules()
        if any(True for _ in module.parameters(recurse=False))
    )
