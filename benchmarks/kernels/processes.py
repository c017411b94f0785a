"""A process for each measurement, so that no contender's memory is hidden in another's."""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.child import result_of
from benchmarks.kernels.measure import measured

TIMEOUT_S = 900
_LETTERS = 200


def child(task: str, shape: str, contender: str, device: str, repeats: int) -> dict[str, Any]:
    """Measure in a separate process.

    On a CPU it is forked from this one, which has imported PyTorch and computed nothing: most of a short measurement
    would be the import. A process that uses a GPU cannot be forked.
    """
    arguments = (task, shape, contender, device, repeats)
    if device == "cuda" or sys.platform != "linux":
        command = [sys.executable, "-m", "benchmarks.kernels.measure", *map(str, arguments)]
        return result_of(command, TIMEOUT_S, _LETTERS)
    return _forked(*arguments)


def _forked(*arguments: str | int) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(send, arguments))
    process.start()
    send.close()
    try:
        result = receive.recv() if receive.poll(TIMEOUT_S) else {"not_run": f"not done after {TIMEOUT_S} s"}
    except EOFError:
        process.join()
        result = {"not_run": f"failed: exit status {process.exitcode}"}
    process.kill()
    process.join()
    return result


def _send(send: Connection, arguments: tuple[Any, ...]) -> None:
    try:
        result = measured(*arguments)
    except Exception as error:
        result = {"not_run": f"failed: {traceback.format_exception_only(error)[-1].strip()}"[:_LETTERS]}
    send.send(result)
