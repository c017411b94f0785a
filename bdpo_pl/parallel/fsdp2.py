"""A policy that no device holds whole: FSDP2, tensor and context parallelism by Lightning's ModelParallelStrategy.

The model is built without memory (on the meta device), split, and only then given weights: each rank reads its own part
of them from the safetensors files. Checkpoints are single files that are loaded with `weights_only`, whichever strategy
wrote them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from bdpo_pl.errors import InputError
from bdpo_pl.models.adapter_start import START, Start
from bdpo_pl.models.adapters import LoraOptions, add_adapters
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.loading import (
    ModelSource,
    check_not_quantised,
    enable_activation_checkpointing,
    load_config,
    model_class,
)
from bdpo_pl.models.reach import freeze_unreached
from bdpo_pl.parallel.context_parallel import ContextGroup, share_attention, stop_sharing_attention
from bdpo_pl.parallel.cpu_offload import backend_for, check_cpu_offload, move_other_parts, offload_policy
from bdpo_pl.parallel.from_files import compute_buffers, fill
from bdpo_pl.parallel.saved_parts import load_parts, partial_of, put_in_place, remove
from bdpo_pl.parallel.state import (
    CONTEXT,
    DATA,
    TENSOR,
    load_optimizer_state,
    load_state,
    whole_optimizer_state,
    whole_state,
)
from bdpo_pl.parallel.tensor_parallel import check_tensor_parallel, parallelize
from bdpo_pl.parallel.weight_files import WeightFiles


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices; with `tensor_parallel_size`, over groups of that many devices that share each layer.

    Args:
        tensor_parallel_size: number of devices that share a layer; they should be on one node.
        context_parallel_size: number of devices that share the positions of each row, for pairs whose activations do
            not fit into one device; it divides the attention heads, and the devices should be on one node. The weights
            are split over all devices.
        data_parallel_size: number of groups that split the batch and the weights; `auto`: as many as the devices
            permit.
        save_distributed_checkpoint: write one file for each rank by PyTorch's distributed checkpoint, whose index is
            unpickled on loading. Meant for models whose optimiser state does not fit into one host's memory. By
            default, one file is written, which is loaded without unpickling.
        cpu_offload: keep weights, gradients and the optimiser's state in the host's memory, and take the optimiser's
            steps there. Each weight is copied to its GPU whenever it is used, so steps take longer.
        kwargs: further arguments of `ModelParallelStrategy`.
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        data_parallel_size: int | Literal["auto"] = "auto",
        save_distributed_checkpoint: bool = False,
        context_parallel_size: int = 1,
        cpu_offload: bool = False,
        **kwargs: Any,
    ) -> None:
        if context_parallel_size < 1:
            raise InputError(f"context_parallel_size must be at least 1, got {context_parallel_size}")
        if context_parallel_size > 1 and tensor_parallel_size > 1:
            raise InputError(
                f"context_parallel_size is {context_parallel_size} and tensor_parallel_size {tensor_parallel_size}: "
                "devices share either rows or layers; set one of them to 1"
            )
        if cpu_offload and tensor_parallel_size > 1:
            raise InputError(
                f"cpu_offload has not been tried on layers that devices share, and tensor_parallel_size is "
                f"{tensor_parallel_size}; set it to 1, or leave cpu_offload out"
            )
        self.cpu_offload = cpu_offload
        self.context_parallel_size = context_parallel_size
        self.context_group: ContextGroup | None = None
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            **kwargs,
        )

    @property
    def tensor_parallel_size(self) -> int:
        """Number of devices that share a layer."""
        return int(self._tensor_parallel_size)

    @property
    def splits_layers(self) -> bool:
        """True if devices share each layer, by tensor parallelism."""
        return self.tensor_parallel_size > 1

    @property
    def saves_parts(self) -> bool:
        """True if each rank writes a file of its own."""
        return bool(self._save_distributed_checkpoint)

    def check_sizes(self, devices: int) -> None:
        """Raise `InputError` if groups of the requested sizes do not divide the number of `devices`."""
        for name in ("tensor_parallel_size", "context_parallel_size"):
            if devices % (size := getattr(self, name)):
                raise InputError(
                    f"{name} is {size}, which does not divide the {devices} devices; set it to a divisor of them, or "
                    "to 1"
                )
        groups = devices // self.tensor_parallel_size
        if self._data_parallel_size not in ("auto", groups):
            raise InputError(
                f"data_parallel_size is {self._data_parallel_size}, but {devices} devices in groups of "
                f"{self.tensor_parallel_size} make {groups}; leave it out"
            )

    def setup_environment(self) -> None:
        """Count the groups, now that the number of devices is known, and let the ranks of a group share rows."""
        if self.cpu_offload:
            check_cpu_offload(self.root_device.type, str(self.precision_plugin.precision))
            self._process_group_backend = backend_for(self._process_group_backend, self.root_device.type)
        size, devices = self.context_parallel_size, self.num_nodes * self.num_processes
        self.check_sizes(devices)
        if self._data_parallel_size == "auto":
            self._data_parallel_size = devices // self.tensor_parallel_size
        super().setup_environment()
        if size > 1:
            mesh = init_device_mesh(
                self.root_device.type, (self.world_size // size, size), mesh_dim_names=(DATA, CONTEXT)
            )
            self.context_group = ContextGroup(mesh.get_group(CONTEXT), mesh.get_local_rank(CONTEXT), size)
            share_attention(self.context_group)

    def setup(self, trainer: L.Trainer) -> None:
        """Set up model and optimisers; what an optimiser keeps from its beginning stays where its weights are."""
        super().setup(trainer)
        if self.cpu_offload:
            _optimizers_to_device(self.optimizers, torch.device("cpu"))

    def model_to_device(self) -> None:
        """Move what is not on the device yet, except for weights that are kept on the host."""
        if self.cpu_offload:
            assert self.model is not None
            move_other_parts(self.model, self.root_device)
        else:
            super().model_to_device()

    def teardown(self) -> None:
        """Leave transformers' attention functions as they were."""
        stop_sharing_attention()
        super().teardown()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Number of the group of ranks that read the same data, and number of these groups."""
        found = super().distributed_sampler_kwargs
        return {name: value // self.context_parallel_size for name, value in found.items()}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the trained weights and the adapters' starts. A frozen base is not gathered: checkpoints omit it."""
        assert self.model is not None
        if not self._save_distributed_checkpoint:
            return whole_state(self.model, trained_only=True)
        options = StateDictOptions(cpu_offload=True, ignore_frozen_params=True)
        starts = {name: p.detach() for name, p in self.model.named_parameters() if name.endswith(START)}
        return get_model_state_dict(self.model, options=options) | starts

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the whole state of `optimizer`, in the form that it has on one device."""
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        return whole_optimizer_state(getattr(optimizer, "_optimizer", optimizer))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object = None) -> None:
        """Write a checkpoint, completely or not at all. All ranks call this."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        # Written over the parts of an older checkpoint, the rest of which an interruption would leave, it would be a
        # mixture of both that looks whole.
        partial = partial_of(path)
        if self.is_global_zero:
            remove(partial)
        self.barrier()
        try:
            super().save_checkpoint(checkpoint, partial, storage_options)
        except BaseException:
            # The disk may be full of it.
            if self.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        # The first process has written the last file.
        if self.is_global_zero:
            put_in_place(path)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint. Every rank maps the file and reads its own part; the optimisers' state follows later."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            assert self.lightning_module is not None
            return load_parts(path, self.lightning_module, self.optimizers)
        checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        assert self.lightning_module is not None
        load_state(self.lightning_module, checkpoint["state_dict"])
        return checkpoint

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: Lightning calls `load_optimizer_state_dict`, after the module has adapted an older checkpoint."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's part of the optimisers' state; of a checkpoint in parts nothing is left to load."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            load_optimizer_state(getattr(optimizer, "_optimizer", optimizer), state)


StrategyRegistry.register("fsdp2", ShardedStrategy, description="FSDP2, with tensor or context parallelism")


def build_sharded(
    source: ModelSource,
    dtype: torch.dtype,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    lora: LoraOptions | None = None,
    gradient_checkpointing: bool = False,
    half_products: torch.dtype | None = None,
    cpu_offload: bool = False,
) -> CausalLM:
    """Return this rank's part of the model of `source`. All ranks call this function.

    Args:
        source: location of a model in safetensors files.
        dtype: dtype of the weights that are kept.
        mesh: device mesh with the dimensions `data_parallel` (split by FSDP2) and `tensor_parallel`.
        device: device that computes, and holds the parts.
        lora: options of the adapters to add.
        gradient_checkpointing: recompute each block in the backward pass.
        half_products: dtype in which weights are sent and multiplied; gradients are still summed in float32.
        cpu_offload: hold the parts in the host's memory instead.

    Raises:
        InputError: the model cannot be split in this way, or its files lack a weight.
    """
    config = load_config(source)
    check_not_quantised(config, source.name)
    data, tensor = mesh[DATA], mesh[TENSOR]
    if tensor.size() > 1:
        check_tensor_parallel(config, tensor.size(), source.name, adapted=lora is not None)
    with torch.device("meta"):
        model = model_class(source, config, dtype)
    model.config.use_cache = False
    files = WeightFiles.of(source)
    files.take_names_of(model)
    freeze_unreached(model)
    if gradient_checkpointing:
        enable_activation_checkpointing(model)
    if lora is not None:
        add_adapters(model, lora)
    if tensor.size() > 1:
        parallelize(model, tensor)
    if data.size() > 1 or cpu_offload:
        policy = MixedPrecisionPolicy(param_dtype=half_products, reduce_dtype=torch.float32)
        offload = offload_policy(cpu_offload, device)
        for module in (*_blocks(model), model):
            fully_shard(module, mesh=data, mp_policy=policy, offload_policy=offload)
        if device.type == "cpu":
            # gloo has no averaging reduce-scatter; set to average, FSDP2 would return the sum (pytorch#162338).
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)
    start = None if lora is None else Start(lora.init, lora.adapter)
    with files:
        fill(model, files, torch.device("cpu") if cpu_offload else device, start, buffers=device)
    if start is not None and start.folder is not None:
        start.folder.check_all_read()
    compute_buffers(model, device)
    return model


def _blocks(model: CausalLM) -> list[nn.Module]:
    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise InputError(f"{type(model).__name__} does not name its blocks, so it cannot be sharded by them")
    return blocks
