"""A measurement in a process of its own, so that no contender's memory is hidden in another's."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any


def result_of(command: Sequence[str], timeout_s: float, letters: int) -> dict[str, Any]:
    """Run `command` and return the JSON object in the last line that it writes; `not_run` says why there is none.

    Args:
        command: command and arguments.
        timeout_s: seconds after which it is killed.
        letters: maximum length of the reason.
    """
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return {"not_run": f"not done after {timeout_s} s"}
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines()
        return {"not_run": f"failed: {lines[-1] if lines else f'exit status {result.returncode}'}"[:letters]}
    return json.loads(result.stdout.strip().splitlines()[-1])
