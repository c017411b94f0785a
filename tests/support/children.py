"""Processes that start in a moment: forked from a server, which has imported once what takes seconds to import."""

import os
import runpy
import socket
import subprocess
import sys
import tempfile
from multiprocessing import forkserver, get_context
from pathlib import Path

import torch.multiprocessing as mp

forkserver.set_forkserver_preload(["preloaded"])


def start(function, args, processes, join=True):
    """Call `function(rank, *args)`, of an importable module, in `processes` processes, with this one's environment.

    The server has no threads and has computed nothing, so that a process is what a fresh interpreter would be.

    Returns:
        None, or, unless `join`, torch's context of the processes.
    """
    serve()
    return mp.start_processes(
        _with_environment, (dict(os.environ), function, args), nprocs=processes, join=join, start_method="forkserver"
    )


def launch(module, arguments, environment=None, folder=None):
    """Start `python -m module arguments` with `environment` added to this process's; its output goes to `folder`.

    Returns:
        The process.
    """
    serve()
    environment = {**os.environ, **(environment or {})}
    process = get_context("forkserver").Process(
        target=_with_environment, args=(folder, environment, _run_module, (module, [*map(str, arguments)]))
    )
    process.start()
    return process


def command(module, arguments, timeout=300, **environment):
    """Run `python -m module arguments`, as `subprocess.run` would.

    Returns:
        A `subprocess.CompletedProcess` with what was printed.
    """
    return _commands(module, arguments, timeout, [environment])[0]


def command_in_ranks(module, arguments, world_size=2, timeout=300, **environment):
    """Run `python -m module arguments` as each of `world_size` ranks of a launcher.

    Lightning's own launcher would start all but the first anew, which imports for seconds.

    Returns:
        A `subprocess.CompletedProcess` of each rank.
    """
    shared = {**environment, "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return _commands(module, arguments, timeout, [{**shared, "LOCAL_RANK": str(rank)} for rank in range(world_size)])


def _commands(module, arguments, timeout, environments):
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / str(i) for i in range(len(environments))]
        for folder in folders:
            folder.mkdir()
        processes = [
            launch(module, arguments, environment, folder)
            for environment, folder in zip(environments, folders, strict=True)
        ]
        for process in processes:
            process.join(timeout)
        if any(process.exitcode is None for process in processes):
            for process in processes:
                process.kill()
            raise subprocess.TimeoutExpired([module, *arguments], timeout)
        printed = [[(folder / name).read_text(encoding="utf-8") for name in ("out", "err")] for folder in folders]
    return [
        subprocess.CompletedProcess([module, *arguments], process.exitcode, *texts)
        for process, texts in zip(processes, printed, strict=True)
    ]


def free_port():
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve():
    """Start the server, if it is not there yet."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [before])])
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _with_environment(first, environment, function, args):
    """Call `function` with `first`, a rank or a folder, and `args`."""
    os.environ.clear()
    os.environ |= environment
    function(first, *args)


def _run_module(folder, module, arguments):
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(Path(folder) / name if folder else os.devnull, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
