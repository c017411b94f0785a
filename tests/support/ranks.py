"""Processes that talk to each other by gloo, for the tests of distributed code."""

import os

import torch
import torch.distributed as dist
from children import start


def run_ranks(function, folder, *args, world_size=2):
    """Call `function(rank, *args)`, of an importable module, in `world_size` processes; raises if one of them does."""
    start(_start, (function, world_size, str(folder / f"rendezvous-{function.__name__}"), args), world_size)


def each(rank, *functions):
    """Call each of `functions` in turn."""
    for function in functions:
        function(rank)


def _start(rank, function, world_size, rendezvous, args):
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
