"""Processes that start in a moment: forked from a server, which has imported once what takes seconds to import."""

import os
from multiprocessing import forkserver
from pathlib import Path

import torch.multiprocessing as mp

forkserver.set_forkserver_preload(["preloaded"])


def start(function, args, processes, join=True):
    """Call `function(rank, *args)`, of an importable module, in `processes` processes, with this one's environment.

    The server has no threads and has computed nothing, so that a process is what a fresh interpreter would be.

    Returns:
        None, or, unless `join`, torch's context of the processes.
    """
    environment = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parent), environment.get("PYTHONPATH")])
    )
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= environment
    return mp.start_processes(
        _with_environment, (environment, function, args), nprocs=processes, join=join, start_method="forkserver"
    )


def _with_environment(rank, environment, function, args):
    os.environ.clear()
    os.environ |= environment
    function(rank, *args)
