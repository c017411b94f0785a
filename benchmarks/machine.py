"""Machine and software of a measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "trl", "liger_kernel", "cut_cross_entropy", "quack-kernels", "transformers")
_ROOT = Path(__file__).parents[1]


def machine(device: str) -> dict[str, Any]:
    """Return hardware, versions and commit."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def usable_cores() -> int:
    """Return the number of cores that this process may use (Linux only)."""
    return len(os.sched_getaffinity(0))


def process_memory(field: str) -> int:
    """Return bytes of this process's memory: "VmRSS" for now, "VmHWM" for the peak so far (Linux only)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown CPU"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    result = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None
