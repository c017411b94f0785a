"""The policy as it is trained: whole or split, with adapters or without; and its way back to a plain model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from bdpo_pl.adapters import LoraOptions, add_adapters, merged
from bdpo_pl.errors import InputError
from bdpo_pl.models import ModelSource, enable_activation_checkpointing, load_config, load_model, model_class

_PREFIX = "policy."


def data_ranks(trainer: L.Trainer) -> tuple[int, int]:
    """(number of this process, number of processes) among those that are given different data.

    Ranks that share a layer by tensor parallelism share its data too.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        kwargs = trainer.strategy.distributed_sampler_kwargs
        return int(kwargs["rank"]), int(kwargs["num_replicas"])
    return trainer.global_rank, trainer.world_size


def build_policy(
    trainer: L.Trainer,
    source: ModelSource,
    dtype: torch.dtype,
    load: Callable[[], nn.Module],
    *,
    lora: LoraOptions | None = None,
    gradient_checkpointing: bool = False,
) -> Any:
    """The policy in training mode, as the Trainer's strategy wants it.

    Args:
        trainer: its strategy says whether and how the model is split.
        source: the model.
        dtype: of its weights.
        load: gives the whole model; not called where it is split.
        lora: adapters to add; then nothing else is trained.
        gradient_checkpointing: recompute activations in the backward pass.

    Raises:
        InputError: the model, the adapters and the strategy do not fit each other.
    """
    strategy = trainer.strategy
    model: Any
    if isinstance(strategy, ModelParallelStrategy):
        from bdpo_pl.sharding import build_sharded

        model = build_sharded(
            source,
            dtype,
            strategy.device_mesh,
            strategy.root_device,
            lora=lora,
            gradient_checkpointing=gradient_checkpointing,
            half_products={"bf16-mixed": torch.bfloat16}.get(str(trainer.precision)),
        )
    else:
        model = load()
        if gradient_checkpointing:
            enable_activation_checkpointing(model)
        if lora is not None:
            add_adapters(model, lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = "" if lora is None else f", {trained:,} of them trained"
    rank_zero_info(
        f"Policy: {type(model).__name__.removeprefix('FSDP')}, {sum(p.numel() for p in model.parameters()):,} "
        f"parameters in {str(dtype).removeprefix('torch.')}{share}, from {source.name}"
    )
    # transformers loads in evaluation mode, and Lightning keeps the mode it finds.
    return model.train()


def plain_model(source: ModelSource, dtype: torch.dtype, state: dict[str, Tensor], lora: LoraOptions | None) -> Any:
    """A model of transformers on the CPU with the weights of `state` (of `whole_state`), adapters merged."""
    if lora is not None:
        return merged(load_model(source, dtype), lora, state)
    with torch.device("meta"):
        model = model_class(source, load_config(source), dtype)
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    return model


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint that `bdpo_pl.fit` wrote, its tensors on disk still.

    Raises:
        InputError: it is not there, not whole or of another program.
    """
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no checkpoint at {path} (looked from {Path.cwd()})") from None
    except Exception as error:  # whatever is wrong with it, it is not a checkpoint
        raise InputError(f"{path} is not a whole checkpoint ({type(error).__name__})") from error
    if not isinstance(saved, dict) or "bdpo_pl" not in saved:
        raise InputError(f"{path} was not written by bdpo_pl.fit; give the folder of its exported model")
    return saved


def checkpoint_model(path: Path, source: ModelSource, dtype: torch.dtype) -> Any:
    """A model of transformers on the CPU with the policy's weights of a checkpoint, adapters merged.

    Args:
        path: the checkpoint.
        source: the model that it was trained from.
        dtype: of the weights.

    Raises:
        InputError: see `read_checkpoint`.
    """
    saved = read_checkpoint(path)
    state = {
        name.removeprefix(_PREFIX): value for name, value in saved["state_dict"].items() if name.startswith(_PREFIX)
    }
    lora = saved["bdpo_pl"]["lora"]
    if lora is not None:
        return plain_model(source, dtype, state, LoraOptions(**lora))
    # Into a whole model: what is in no checkpoint, as the positions' frequencies and how to generate, comes with it.
    model = load_model(source, dtype)
    found = model.load_state_dict(state, strict=False)
    left = set(found.missing_keys) - set(getattr(model, "all_tied_weights_keys", ()))
    if left or found.unexpected_keys:
        raise InputError(
            f"{path} does not hold the weights of {source.name} (first that differs: "
            f"{min([*left, *found.unexpected_keys])}); the folder of its exported model may"
        )
    return model
