"""What ranks do in the tests of CPU offload: one with a pretended GPU, in a process of its own, or two on the CPU."""

import json
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from pretend_gpu import Peak, fused_attention, pretended
from sharded_jobs import train
from sharded_ranks import checkpoint_at, keep
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bdpo_pl.errors import InputError
from bdpo_pl.forward.fused_loss import fused_preference_loss
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.losses import DPOLoss, PairScores
from bdpo_pl.models import activation_offloading
from bdpo_pl.models.adapters import LoraOptions
from bdpo_pl.models.loading import ModelSource
from bdpo_pl.models.precision import device_of
from bdpo_pl.parallel.cpu_offload import move_other_parts
from bdpo_pl.parallel.fsdp2 import build_sharded
from bdpo_pl.parallel.state import load_optimizer_state, load_state, whole_optimizer_state, whole_state
from bdpo_pl.training.adafactor import Adafactor
from bdpo_pl.training.guards import finite_gradient_norm
from bdpo_pl.training.optim import AdamW, make_optimizer
from bdpo_pl.training.optimizers import Muon
from bdpo_pl.training.planned_batches import worst_batch
from bdpo_pl.training.schedule_free import ScheduleFreeAdamW, at_average

OPTIMIZERS = (
    AdamW,
    partial(torch.optim.SGD, momentum=0.9, lr=0.1),
    # Its state is there before the first step.
    torch.optim.Adagrad,
    Adafactor,
    ScheduleFreeAdamW,
    Muon,
)
PAIRS, WINDOW = 2, 32


def losses(chosen, rejected, index):
    zeros = torch.zeros_like(chosen)
    lengths = torch.ones(len(index), dtype=torch.int64, device=chosen.device)
    return DPOLoss()(chosen, rejected, PairScores(lengths, lengths, zeros, zeros))


def kinds(tensors):
    """Types of the devices on which this rank's parts of `tensors` are."""
    return {(t.to_local() if isinstance(t, DTensor) else t).device.type for t in tensors}


def state_of(optimizer):
    return [
        value for values in optimizer.state.values() for value in values.values() if isinstance(value, torch.Tensor)
    ]


def placed(_, folder, world_size):
    """Steps of each optimiser: where weights, gradients and state are, and where the products are computed."""
    worst = worst_batch(PAIRS, WINDOW, True)
    with pretended(world_size) as (mesh, gpu):
        batch = worst.to(gpu)
        for make in OPTIMIZERS:
            model = build_sharded(
                ModelSource(str(folder)),
                torch.float32,
                mesh,
                gpu,
                half_products=torch.bfloat16,
                cpu_offload=True,
            ).train()
            assert device_of(model) == gpu
            assert kinds(model.buffers()) == {"gpu"}
            optimizer = make_optimizer(make, model, 1.0)
            products = watch_products(model)
            for _ in range(2):
                loss, logps = fused_preference_loss(model, batch, losses)
                loss.backward()
                assert kinds([loss, logps]) == {"gpu"}
                trained = [p for p in model.parameters() if p.requires_grad]
                assert kinds(p.grad for p in trained) == {"cpu"}
                norm = finite_gradient_norm(SimpleNamespace(precision_plugin=None), model)
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, norm)
                optimizer.step()
                optimizer.zero_grad()
            assert products == {("gpu", "gpu", torch.bfloat16)}
            assert kinds(model.parameters()) == {"cpu"}
            assert kinds(state_of(optimizer)) == {"cpu"}
            saved_and_loaded(model, optimizer)
            with torch.no_grad(), at_average([optimizer], model):
                assert kinds([response_logps(model.eval(), batch)]) == {"gpu"}


def watch_products(model):
    """A set that gets the devices and dtypes of the inputs and weights of linear layers in the blocks."""
    found = set()

    def before(module, args):
        found.add((args[0].device.type, module.weight.device.type, module.weight.dtype))

    for module in model.model.layers.modules():
        if type(module) is nn.Linear:
            module.register_forward_pre_hook(before)
    return found


def saved_and_loaded(model, optimizer):
    """A checkpoint is whole and on the host, and what is read from it stays there."""
    state, optimized = whole_state(model, trained_only=False), whole_optimizer_state(optimizer)
    assert state.keys() == {name for name, _ in model.named_parameters()}
    assert all(state[name].shape == p.shape for name, p in model.named_parameters() if name in state)
    assert kinds(state.values()) == {"cpu"}
    assert not any(isinstance(value, DTensor) for value in state.values())
    load_state(model, state)
    load_optimizer_state(optimizer, optimized)
    assert kinds(model.parameters()) == {"cpu"}
    assert kinds(state_of(optimizer)) == {"cpu"}


def a_module_around_it_is_moved(_, folder):
    """All of a LightningModule but the weights that are kept on the host."""
    with pretended(2) as (mesh, gpu):
        module = nn.Module()
        module.policy = build_sharded(ModelSource(str(folder)), torch.float32, mesh, gpu, cpu_offload=True)
        module.means = nn.BatchNorm1d(3, affine=False)
        move_other_parts(module, gpu)
        assert [name for name, _ in module.named_children()] == ["policy", "means"]
        assert kinds(module.policy.parameters()) == {"cpu"}
        assert kinds(module.means.state_dict().values()) == {"gpu"}


def runs_on_cpus(rank, folder):
    """A run of FSDP2, the same with its policy of offloading, and that resumed in the middle."""
    with pytest.raises(InputError, match=r"cpu_offload keeps weights.*leave it out"):
        train(folder, "offload-refused", 2)
    one_epoch = {"max_epochs": 1}
    for kind, options in (("", {}), ("-lora", {"lora": LoraOptions(r=4)})):
        plain = train(folder, f"fsdp2{kind}", 2, trainer=one_epoch, **options)
        keep(rank, folder, f"fsdp2{kind}", plain)
        name = f"offload{kind}"
        with (
            mock.patch("bdpo_pl.parallel.fsdp2.check_cpu_offload"),
            mock.patch("bdpo_pl.training.start_checks.check_cpu_offload"),
        ):
            result = train(folder, name, 2, trainer=one_epoch, callbacks=[checkpoint_at(folder, name, 2)], **options)
            keep(rank, folder, name, result)
            assert {parameter.offload_to_cpu for parameter in parameters_of_fsdp(result[2].policy)} == {True}
            path = str(folder / f"{name}-steps" / "step=2.ckpt")
            again = train(folder, f"{name}-again", 2, trainer=one_epoch, cache=name, ckpt_path=path, **options)
            keep(rank, folder, f"{name}-resumed", again)


def parameters_of_fsdp(model):
    groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)]
    return [parameter for group in groups if group is not None for parameter in group.fsdp_params]


SIZES = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "vocab_size": 800}
CASES = {"nothing": (False, False), "weights": (True, False), "activations": (False, True), "both": (True, True)}
LARGE = 2**12
"""What counts as large memory in a small model."""


def peaks(_, folder):
    """The most memory of the second step, by type of device, for each of `CASES`."""
    activation_offloading.MIN_BYTES = LARGE
    worst = worst_batch(4, 128, True)
    found = {}
    with pretended(2) as (mesh, gpu), fused_attention():
        batch = worst.to(gpu)
        for name, (weights, activations) in CASES.items():
            with Peak() as peak:
                model = build_sharded(ModelSource(str(folder)), torch.float32, mesh, gpu, cpu_offload=weights).train()
                if activations:
                    activation_offloading.OffloadedActivations(model, gpu)
                optimizer = make_optimizer(AdamW, model, 1.0)
                for _ in range(2):
                    peak.reset()
                    loss, _ = fused_preference_loss(model, batch, losses)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    del loss
            found[name] = peak.most
            del model, optimizer
    (folder / "peaks.json").write_text(json.dumps(found))
