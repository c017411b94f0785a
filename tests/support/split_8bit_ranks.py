"""What each rank does in the tests of 8-bit AdamW on parts of weights, and the same on one device."""

from copy import deepcopy

import torch
import torch.distributed as dist
from optimizer_ranks import steps
from sharded_jobs import train
from sharded_ranks import checkpoint_at, keep
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from bdpo_pl.parallel.state import DATA, load_optimizer_state, local_part, local_ranges, whole, whole_optimizer_state
from bdpo_pl.training.model_card import run_settings
from bdpo_pl.training.optim import make_optimizer
from bdpo_pl.training.optimizers import AdamW8bit
from bdpo_pl.training.split_8bit import BLOCK, SplitAdamW8bit, keeps_blocks

UNEVEN = "crooked.weight"
"""Its part on the second of two ranks begins within a block."""


class Model(nn.Module):
    """A table, matrices with and without parts that keep blocks, one with a row for one rank only, and vectors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(101, 64)
        self.even, self.stacked = nn.Linear(64, 96), nn.Parameter(torch.randn(6, 32, 64))
        # The last block of the whole is not full.
        self.rest = nn.Linear(192, 31)
        self.crooked = nn.Linear(70, 61)
        self.row = nn.Linear(5120, 1)
        self.small, self.long = nn.Linear(8, 8), nn.Parameter(torch.randn(4096))


def build(mesh=None, at=None, state=None):
    """The model and its optimiser, from a checkpoint if there is one."""
    model = Model()
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    optimizer = make_optimizer(lambda groups: AdamW8bit(groups, lr=1e-2, weight_decay=0.1), model, 1.0)
    if at is not None:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), at, strict=True):
                parameter.copy_(value if mesh is None else distribute_tensor(value, mesh, parameter.placements))
    if state is not None:
        state = deepcopy(state)
        optimizer.load_state_dict(state) if mesh is None else load_optimizer_state(optimizer, state)
    return model, optimizer


def saved(model, optimizer):
    """Weights and the optimiser's state as a checkpoint has them, the latter on every rank."""
    if not dist.is_initialized():
        return [p.detach().clone() for p in model.parameters()], deepcopy(optimizer.state_dict())
    state = [deepcopy(whole_optimizer_state(optimizer))]
    dist.broadcast_object_list(state)
    return [whole(p.detach()).clone() for p in model.parameters()], state[0]


def after(number, *, mesh=None, start=(None, None), first=0):
    """A checkpoint after steps `first` to `number`."""
    model, optimizer = build(mesh, *start)
    steps(range(first, number), model, optimizer)
    return saved(model, optimizer)


def runs(rank, folder):
    """A checkpoint after three steps and one after five, and the latter from the former, of every number of ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(DATA,))
    size = mesh.size()
    found = {"at 3": after(3, mesh=mesh), "at 5": after(5, mesh=mesh)}
    for source in folder.glob("at 3 of *.pt"):
        start = torch.load(source, weights_only=True)
        found[f"from {source.stem.split()[-1]}"] = after(5, mesh=mesh, start=start, first=3)
        check_parts(*build(mesh, *start), start[1])
    if rank == 0:
        for name, value in found.items():
            torch.save(value, folder / f"{name} of {size}.pt")


def flat(values):
    found = {}
    for name, value in values.items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def check_parts(model, optimizer, state):
    """The state of each part is that of the whole, read by bitsandbytes itself."""
    from bitsandbytes.functional import dequantize_blockwise

    def read(values, number):
        code = values[f"state{number}"]
        if code.dtype == torch.float32:
            return code
        scales, table = values[f"absmax{number}"], values[f"qmap{number}"]
        if not code.numel():
            return code.float()
        return dequantize_blockwise(code, absmax=scales, code=table, blocksize=BLOCK).view(code.shape)

    for number, (parameter, _) in enumerate(ordered(model, optimizer)):
        mine, theirs = optimizer.state[parameter], flat(state["state"][number])
        assert mine["step"] == theirs["step"] == 3
        in_8_bits = theirs["state1"].dtype == torch.uint8 and keeps_blocks(parameter)
        assert mine["state1"].dtype == (torch.uint8 if in_8_bits else torch.float32)
        for i in (1, 2):
            assert torch.equal(read(mine, i), read(theirs, i)[local_ranges(parameter)])
            assert mine[f"state{i}"].shape == local_part(parameter).shape


def ordered(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    return [(p, names[id(p)]) for group in optimizer.param_groups for p in group["params"]]


def job(folder, name, ranks, **options):
    found = {"optimizer": lambda params: AdamW8bit(params, lr=1e-3, weight_decay=0.1), "lr_schedule": "constant"}
    return train(folder, name, ranks, trainer={"max_epochs": 1}, **found, **options)


def trained(rank, folder):
    """A run of two ranks, the same resumed in its middle, and one that goes on from a checkpoint of one device."""
    found = job(folder, "fsdp2", 2, callbacks=[checkpoint_at(folder, "fsdp2", 2)])
    keep(rank, folder, "fsdp2", found)
    trainer = found[2].trainer
    # The card says what was chosen, not what has the parts.
    assert type(trainer.optimizers[0]) is SplitAdamW8bit
    assert run_settings(trainer, found[2], trainer.datamodule)["optimiser"].startswith("AdamW8bit, learning rate 0.001")
    for name in ("fsdp2", "one"):
        path = str(folder / f"{name}-steps" / "step=2.ckpt")
        keep(rank, folder, f"from-{name}", job(folder, f"fsdp2-from-{name}", 2, cache="fsdp2", ckpt_path=path))
