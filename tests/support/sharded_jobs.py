"""Short runs of one or several processes, for the tests of strategies."""

import os

import lightning as L
import torch
from children import free_port, start
from lightning.pytorch.loggers import CSVLogger
from training import fused_adamw

from bdpo_pl.parallel.fsdp2 import ShardedStrategy
from bdpo_pl.parallel.state import whole_state
from bdpo_pl.scoring.scoring_pass import ScoringOptions
from bdpo_pl.training.callbacks import RandomState
from bdpo_pl.training.datamodule import PreferenceDataModule
from bdpo_pl.training.module import PreferenceModule

WORLD_BATCH = 8


def train(
    folder,
    name,
    world_size=1,
    *,
    model="model",
    pairs="pairs.jsonl",
    sharing=None,
    cache=None,
    ckpt_path=None,
    callbacks=(),
    data=None,
    **options,
):
    """Two epochs on the pairs of `folder`, WORLD_BATCH of them to a step however many processes share it.

    Without a line of the log for each step, each number of which the ranks would have to agree on.

    Args:
        folder: holds `model` and `pairs`.
        name: `ddp`, `fsdp2`, `offload`, `parts`, `tp`, `context` or `one`, and anything after a dash.
        cache: name of the run whose scores are read; default: its own.
        sharing: batches in a step; default the processes that share data.

    Returns:
        Trained state (on rank 0), evaluations, and the module.
    """
    strategy = {
        "one": "auto",
        "ddp": "ddp",
        "fsdp2": ShardedStrategy(),
        "tp": ShardedStrategy(tensor_parallel_size=2),
        "context": ShardedStrategy(context_parallel_size=2),
        "offload": ShardedStrategy(cpu_offload=True),
        "parts": ShardedStrategy(save_distributed_checkpoint=True),
    }[name.split("-")[0]]
    sharing = sharing or {"one": 1, **dict.fromkeys(("tp", "context"), max(1, world_size // 2))}.get(
        name.split("-")[0], world_size
    )
    trainer_options = {"max_epochs": 2, "log_every_n_steps": 8, **options.pop("trainer", {})}
    torch.manual_seed(0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=-1,
        gradient_clip_val=0.5,
        use_distributed_sampler=False,
        logger=CSVLogger(folder / name, name="", version=""),
        callbacks=[RandomState(), *callbacks],
        enable_checkpointing=bool(callbacks),
        **trainer_options,
    )
    module = PreferenceModule(
        str(folder / model),
        **{
            "optimizer": fused_adamw,
            "scoring": ScoringOptions(cache_dir=str(folder / "cache" / (cache or name)), chunk_pairs=8),
            **options,
        },
    )
    datamodule = PreferenceDataModule(
        str(folder / pairs),
        **{"held_out_fraction": 0.2, "batch_size": WORLD_BATCH // sharing, "max_length": 128, **(data or {})},
    )
    trainer.fit(module, datamodule, ckpt_path=ckpt_path, weights_only=True)
    return whole_state(module.policy, module.lora is not None), module.evaluations, module


def with_intervals(result):
    """Add the intervals of the evaluations to a result of `train`; a resumed run lacks those of earlier steps."""
    state, evaluations, module = result
    known = {
        step: values
        | {f"low of {name}": interval.low for name, interval in module.intervals.get(step, {}).items()}
        | {f"high of {name}": interval.high for name, interval in module.intervals.get(step, {}).items()}
        for step, values in evaluations.items()
    }
    return state, known, module


def spawn(function, *args, world_size=2):
    """Call `function(rank, *args)` in processes that Lightning takes for those of a launcher."""
    processes = start(_start, (function, free_port(), args), world_size, join=False)
    # A rank whose peer is gone waits for it, and minds no signal.
    while not processes.join(grace_period=1):
        pass


def _start(rank, function, port, args):
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    function(rank, *args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
