"""A run under torch's elastic launcher, of which one process is killed once."""

import os
import signal
from pathlib import Path

import lightning as L
import torch
from children import serve
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from bdpo_pl.fit import main


class KillOnce(L.Callback):
    """Kills the last rank in the middle of its third optimiser step, in the first attempt only.

    Args:
        marker: file that says at which step that was.
    """

    def __init__(self, marker: str) -> None:
        self.marker = Path(marker)

    def on_before_backward(self, trainer, *_):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and trainer.global_step == 2 and trainer.global_rank == trainer.world_size - 1:
            self.marker.write_text(str(trainer.global_step))
            os.kill(os.getpid(), signal.SIGKILL)


def fit(folder, options):
    """What each process does, in every attempt."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ["BDPO_PL_CACHE"] = str(folder / "cache")
    main(options)
    return os.environ["TORCHELASTIC_RESTART_COUNT"]


def launch(folder, options):
    """Launch two processes as `torchrun --standalone --nproc_per_node 2 --max_restarts 1` does.

    Returns:
        The number of the attempt in which each rank came to its end.
    """
    serve()
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=1, monitor_interval=0.05, start_method="forkserver", shutdown_timeout=1,
    )  # fmt: skip
    return elastic_launch(config, fit)(folder, options)
