"""Options that do not go together, found before anything is read: a run and its dry run refuse the same.

What only this machine lacks, such as a GPU for quantised weights, is no contradiction of options; it is found where it
is needed, and a run for another machine can be planned here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import ModelParallelStrategy

from bdpo_pl.errors import InputError
from bdpo_pl.forward.router_loss import check_router
from bdpo_pl.losses import PreferenceLoss
from bdpo_pl.models.activation_offloading import check_activation_offloading
from bdpo_pl.models.adapters import LoraOptions
from bdpo_pl.models.loading import ModelSource, check_backend, check_window, load_config
from bdpo_pl.parallel.context_parallel import check_context_parallel
from bdpo_pl.parallel.cpu_offload import check_cpu_offload
from bdpo_pl.parallel.fsdp2 import ShardedStrategy
from bdpo_pl.parallel.tensor_parallel import check_tensor_parallel
from bdpo_pl.parallel.weight_files import check_parts
from bdpo_pl.scoring.machine import Machine
from bdpo_pl.scoring.reestimation import Reestimation
from bdpo_pl.scoring.reference import Reference, ReferenceMode
from bdpo_pl.scoring.reference_sync import ReferenceSync
from bdpo_pl.scoring.scoring_pass import ScoringOptions
from bdpo_pl.training.optim import LRSchedule, check_optimizer
from bdpo_pl.training.trainer_options import check_trainer


class Options(Protocol):
    """Options of a module that may contradict each other, or the Trainer's.

    Attributes:
        source: policy.
        loss: loss of the run.
        lora: options of the adapters, if only adapters are trained.
        activation_offloading: move activations to the host's memory until the backward pass.
        compile_backend: backend for `torch.compile`; None: not compiled.
        router_aux_loss: coefficient of the loss that balances experts.
        reference_mode: use of the reference.
        reference_source: reference.
        own_reference: true if the reference is the policy before training.
        scoring: options of the scoring pass.
        sync: updates of the reference from the policy.
        reestimation: measurements of comprehension on the policy.
        optimizer: function that makes the optimiser.
        lr_schedule: schedule of the learning rate.
        quantization: name of the quantisation of the frozen weights, if any.
    """

    source: ModelSource
    loss: PreferenceLoss
    lora: LoraOptions | None
    activation_offloading: bool
    compile_backend: str | None
    router_aux_loss: float
    reference_mode: ReferenceMode
    reference_source: ModelSource
    own_reference: bool
    scoring: ScoringOptions
    sync: ReferenceSync
    reestimation: Reestimation
    optimizer: Callable[[Any], torch.optim.Optimizer]
    lr_schedule: LRSchedule

    @property
    def quantization(self) -> str | None: ...  # noqa: D102

    def make_reference(self, mode: ReferenceMode, precision: str) -> Reference: ...  # noqa: D102


def check_start(module: Options, trainer: L.Trainer, max_length: int | None) -> None:
    """Refuse options that do not go together; of the models, only the configurations are read.

    Args:
        module: options of the module.
        trainer: Trainer, whose strategy need not be set up.
        max_length: window in tokens that the user requests, if any.

    Raises:
        InputError: two options contradict each other, or one has no effect here.
    """
    check_length(trainer)
    check_trainer(trainer)
    config, name = load_config(module.source), module.source.name
    if max_length is not None:
        check_window(config, max_length, name)
    check_router(config, module.router_aux_loss, name)
    if module.compile_backend is not None:
        check_backend(module.compile_backend)
    if module.activation_offloading:
        check_activation_offloading(device_kind(trainer), module.compile_backend is not None)
    check_parallel(module, trainer)
    check_optimizer(module.optimizer, module.lr_schedule, trainer.strategy, whole=module.lora is None)
    machine = Machine.of(trainer)
    reference = module.make_reference(module.reference_mode, machine.precision)
    reference.check_machine(machine)
    reference.check_fits(module.loss)
    module.sync.check_fits(machine, module.reference_mode, module.own_reference, module.lora is not None)
    module.reestimation.check_fits(machine, module.loss, module.scoring)


def check_length(trainer: L.Trainer) -> None:
    """Raise `InputError` if neither epochs nor steps end the run."""
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise InputError(
            "trainer.max_epochs is -1, and trainer.max_steps does not end the run either, but the learning rate "
            "depends on its length: set one of them"
        )


def check_parallel(module: Options, trainer: L.Trainer) -> None:
    """Refuse what is not made for a strategy that splits the policy, or for ranks that share work.

    Raises:
        InputError: an option of `module` is not.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if module.quantization is not None:
        raise InputError(
            f"model.lora.quantize is {module.quantization}, and quantised weights are not split by "
            f"{type(strategy).__name__}; set it to none, or trainer.strategy to ddp"
        )
    for source in (module.source, *([] if module.reference_mode == "none" else [module.reference_source])):
        check_parts(source.name)
    if not isinstance(strategy, ShardedStrategy):
        return
    strategy.check_sizes(trainer.num_nodes * trainer.num_devices)
    if strategy.cpu_offload:
        check_cpu_offload(device_kind(trainer), str(trainer.precision))
    config, name = load_config(module.source), module.source.name
    if strategy.splits_layers:
        check_tensor_parallel(config, strategy.tensor_parallel_size, name, adapted=module.lora is not None)
    size = strategy.context_parallel_size
    check_context_parallel(config, size, name)
    for given, option, remedy in (
        (module.compile_backend is not None, "model.compile", "leave it out"),
        (module.router_aux_loss > 0, "model.router_aux_loss", "set it to 0"),
        (module.reference_mode == "live", "model.reference_mode live", "set it to precomputed"),
    ):
        if given and size > 1:
            raise InputError(
                f"{option} does not work with trainer.strategy.context_parallel_size {size}, whose ranks share "
                f"the rows of a batch; {remedy}, or set context_parallel_size to 1"
            )


def device_kind(trainer: L.Trainer) -> str:
    """Return the type of the devices that `trainer` computes on, `cuda` or `cpu`."""
    return "cuda" if isinstance(trainer.accelerator, CUDAAccelerator) else "cpu"
