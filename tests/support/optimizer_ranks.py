"""What each rank does in the test of optimisers on the parts of weights that FSDP2 leaves on it."""

from copy import deepcopy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from bdpo_pl.parallel.state import DATA, load_optimizer_state, whole, whole_optimizer_state
from bdpo_pl.training.adafactor import Adafactor
from bdpo_pl.training.optim import parameter_groups
from bdpo_pl.training.optimizers import Muon
from bdpo_pl.training.schedule_free import ScheduleFreeAdamW, averaged_weights


class Model(nn.Module):
    """A table of an odd number of rows, matrices wide and tall, stacked ones, and vectors, one too short for a part."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(21, 6)
        self.wide, self.tall = nn.Linear(12, 5), nn.Linear(6, 31)
        self.experts = nn.Parameter(torch.randn(3, 4, 5))
        self.last = nn.Linear(6, 1)


def gradients(step, model):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in model.parameters()]


def steps(numbers, model, optimizer):
    for step in numbers:
        for parameter, grad in zip(model.parameters(), gradients(step, model), strict=True):
            split = hasattr(parameter, "device_mesh")
            parameter.grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements) if split else grad
        optimizer.step()


def weights(model, optimizer):
    at = averaged_weights([optimizer])
    return [(whole(p.detach()), whole(at.get(id(p), p.detach()))) for p in model.parameters()]


def check(found, expected):
    for pairs in zip(found, expected, strict=True):
        for one, other in zip(*pairs, strict=True):
            # Sums of other orders; Muon multiplies in bfloat16, but the same whole matrices.
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def split_steps_are_those_of_whole_weights(make):
    """Three steps, a checkpoint, and two more: from the checkpoint of parts in parts and whole, and the other way."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(DATA,))

    def build(split):
        model = Model()
        if split:
            fully_shard(model, mesh=mesh)
        return model, make(parameter_groups(model))

    models = {split: build(split) for split in (False, True)}
    for model, optimizer in models.values():
        steps(range(3), model, optimizer)
    check(weights(*models[True]), weights(*models[False]))
    from_parts = [deepcopy(whole_optimizer_state(models[True][1]))]
    dist.broadcast_object_list(from_parts)
    saved = {False: deepcopy(models[False][1].state_dict()), True: from_parts[0]}
    assert shapes(saved[True]) == shapes(saved[False])
    at = {split: [point.clone() for point, _ in weights(*models[split])] for split in models}
    for model, optimizer in models.values():
        steps(range(3, 5), model, optimizer)
    wanted = weights(*models[False])
    check(weights(*models[True]), wanted)
    for source in (False, True):
        for split in (False, True):
            model, optimizer = build(split)
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), at[source], strict=True):
                    mine = distribute_tensor(value, mesh, parameter.placements) if split else value
                    parameter.copy_(mine)
            if split:
                load_optimizer_state(optimizer, deepcopy(saved[source]))
            else:
                optimizer.load_state_dict(deepcopy(saved[source]))
            steps(range(3, 5), model, optimizer)
            check(weights(model, optimizer), wanted)


def shapes(state):
    return {
        number: {name: tuple(v.shape) for name, v in values.items() if isinstance(v, torch.Tensor) and v.ndim}
        for number, values in state["state"].items()
    }


def state_is_read_as_it_was_saved(kind):
    """To the last bit with weights in bfloat16, of which some optimisers keep sums in float32; whole, and in parts."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(DATA,))
    for split in (False, True):
        made = []
        for _ in range(2):
            model = Model().to(torch.bfloat16)
            if split:
                fully_shard(model, mesh=mesh)
            made.append((model, kind(parameter_groups(model), lr=1e-2)))
        (model, optimizer), (_, resumed) = made
        steps(range(2), model, optimizer)
        save = whole_optimizer_state if split else kind.state_dict
        saved = [deepcopy(save(optimizer))]
        dist.broadcast_object_list(saved)
        if split:
            load_optimizer_state(resumed, deepcopy(saved[0]))
        else:
            resumed.load_state_dict(deepcopy(saved[0]))
        found = save(resumed)["state"]
        for number, values in (saved[0]["state"] if dist.get_rank() == 0 else {}).items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    assert found[number][name].dtype == value.dtype, (kind, name)
                    assert torch.equal(found[number][name], value), (kind, name)


def every_optimizer(rank):
    for kind in (Muon, Adafactor, ScheduleFreeAdamW):
        split_steps_are_those_of_whole_weights(lambda params, kind=kind: kind(params, lr=1e-2, weight_decay=0.1))
        state_is_read_as_it_was_saved(kind)
