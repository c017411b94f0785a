"""Processes that start in a moment: forked from a server, which has imported once what takes seconds to import."""

import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from multiprocessing import connection, forkserver, get_context
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
    """Start the server, if it is not there yet; one of its own processes asks it, and starts no second one."""
    server = forkserver._forkserver
    if server._forkserver_pid is None and server._forkserver_address is not None:
        server.ensure_running = lambda: None
        return
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [before])])
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def fork_server():
    """Fork the server from this process, which has imported `preloaded` too: a server of its own imports for seconds.

    To be called before this process has threads that compute, and before pytest watches anything but its output.
    """
    server = forkserver._forkserver
    address = connection.arbitrary_address("AF_UNIX")
    # All processes that may ask hold the writing end; the server ends when the last of them has.
    alive, ours = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            _as_fresh()
            with suppress(SystemExit):
                forkserver.main(listener.detach(), alive, [])
            os._exit(0)
    os.close(alive)
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, ours, pid


def _as_fresh():
    """Undo what pytest does to a process, so that its children write and report as those of a fresh interpreter do."""
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115 - as long as the process
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_pytest")]


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
