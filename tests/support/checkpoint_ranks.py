"""What each of two ranks does in the tests of checkpoints that they write or read together."""

import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, model_parallel
from sharded_jobs import train
from sharded_ranks import checkpoint_at
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from bdpo_pl.errors import InputError
from bdpo_pl.models.adapters import LoraOptions
from bdpo_pl.parallel.fsdp2 import ShardedStrategy
from bdpo_pl.training.checkpoints import find_checkpoint, is_whole
from bdpo_pl.training.identity import RunIdentity


def of_two(kind, rank, **options):
    """A strategy of this process among two."""
    made = kind(**options)
    made.cluster_environment = LightningEnvironment()
    made.cluster_environment.set_global_rank(rank)
    made.parallel_devices = 2 * [torch.device("cpu")]
    return made


def split(value):
    return distribute_tensor(torch.full((6, 4), float(value)), init_device_mesh("cpu", (2,)), [Shard(0)])


def an_interrupted_save(rank, folder):
    """Both ranks stop where all parts are written, but not yet the plain values: the checkpoint before is as it was."""
    strategy = of_two(ShardedStrategy, rank, save_distributed_checkpoint=True)
    path = folder / "checkpoints" / "last.ckpt"
    written = model_parallel._distributed_checkpoint_save

    def save(step):
        strategy.save_checkpoint({"state_dict": {"weight": split(step)}, "global_step": step}, path)

    def holds(step):
        found = {"state_dict": {"weight": split(0)}}
        dcp.load(found, checkpoint_id=path)
        assert torch.equal(found["state_dict"]["weight"].to_local(), split(step).to_local())
        assert torch.load(path / "meta.pt", weights_only=True) == {"global_step": step}
        assert is_whole(path)

    def killed(*args):
        written(*args)
        raise KeyboardInterrupt

    save(1)
    holds(1)
    with mock.patch.object(model_parallel, "_distributed_checkpoint_save", killed), pytest.raises(KeyboardInterrupt):
        save(2)
    strategy.barrier()
    holds(1)
    save(3)
    holds(3)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    assert find_checkpoint("last", folder) == str(path)
    strategy.barrier()
    if rank == 0:
        between_the_renames(folder, path, strategy)
    strategy.barrier()
    save(4)
    holds(4)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def between_the_renames(folder, path, strategy):
    """Killed where the old folder has its other name, and the new one not yet its own."""
    old = path.rename(path.with_name(".last.ckpt.before"))
    shutil.copytree(old, path.with_name(".last.ckpt.partial"))
    assert find_checkpoint("last", folder) == str(old)


def saved_and_resumed(rank, folder):
    """A run whose checkpoint has a file of each rank, and the same from the middle; its adapters keep their starts."""
    options = {"lora": LoraOptions(r=4, init="pissa"), "trainer": {"max_epochs": 1}}
    whole, _, _ = train(folder, "parts", 2, callbacks=[checkpoint_at(folder, "parts", 2)], **options)
    path = folder / "parts-steps" / "step=2.ckpt"
    assert is_whole(path)
    assert path.is_dir()
    resumed, _, module = train(folder, "parts-resumed", 2, cache="parts", ckpt_path=str(path), **options)
    assert module.resumed_at == 2
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())
    assert rank != 0 or len(whole) > 0


def resumes(rank, path):
    trainer = SimpleNamespace(world_size=2, global_rank=rank, strategy=of_two(DDPStrategy, rank))
    RunIdentity(path and str(path)).setup(trainer, None, "fit")


def unlike_checkpoints(rank, folder):
    """Each rank has found a checkpoint of its own; copies of one are the same, and pass on to what comes next."""
    found = {"traits": {"data": {"value": 1}}}
    saved = [{"global_step": 3, "bdpo_pl_run": found}, {"global_step": 4, "bdpo_pl_run": found}, {"global_step": 3}]
    mine = folder / str(rank)
    mine.mkdir()
    for number, content in enumerate(saved):
        torch.save(content, mine / f"{number}.ckpt")
    for paths in ((0, 1), (1, 0), (0, 2), (0, None), (None, 0)):
        path = None if paths[rank] is None else mine / f"{paths[rank]}.ckpt"
        said = f"process 1 from {path or 'none'}. Give all" if rank else f"the first from {path or 'none'}, another"
        with pytest.raises(InputError, match=f"from different checkpoints: .*{said}"):
            resumes(rank, path)
    for number in (0, None):
        # No module is given, in which the pairs would be read.
        with pytest.raises(AssertionError):
            resumes(rank, None if number is None else mine / f"{number}.ckpt")
