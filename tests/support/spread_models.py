"""What runs in the processes of an evaluation on several devices, for its tests."""

import os
import signal
import threading
from multiprocessing import active_children, get_context
from pathlib import Path

from bdpo_pl.errors import InputError
from bdpo_pl.evaluate import main
from bdpo_pl.evaluation import spread
from bdpo_pl.evaluation.verdict_log import RecordFile


def unreadable():
    raise InputError("weights.safetensors is damaged; fetch it again")


def too_large():
    raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")


def faulty():
    raise ZeroDivisionError("a fault of ours")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def left():
    os._exit(7)


def endless():
    threading.Event().wait()


def evaluate_until_killed(rank, arguments, verdicts, pids):
    """Run `evaluate`, write the ids of its processes to `pids` after a number of verdicts, and die without notice."""
    spread.PROCESSES = get_context("forkserver")
    add, seen = RecordFile.add_verdict, []

    def add_verdict(self, *args):
        add(self, *args)
        seen.append(args)
        if len(seen) == verdicts:
            Path(pids).write_text(" ".join(str(child.pid) for child in active_children()))
            os.kill(os.getpid(), signal.SIGKILL)

    RecordFile.add_verdict = add_verdict
    main(arguments)
