"""A checkpoint of one file for each rank: a folder that is complete, or has another name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

META = "meta.pt"
"""File of a checkpoint's plain values, by Lightning; it is written last."""
WEIGHTS = "state_dict."
"""What the names of weights begin with in a checkpoint, by Lightning."""


def is_whole_folder(path: Path) -> bool:
    """Return true if the folder `path` has the index of its parts and the file that is written after them."""
    return (path / ".metadata").is_file() and (path / META).is_file()


def partial_of(path: Path) -> Path:
    """Return the folder in which the checkpoint `path` is written."""
    return path.with_name(f".{path.name}.partial")


def before(name: str) -> str:
    """Return the name that the checkpoint `name` has for the moment in which another takes its place."""
    return f".{name}.before"


def put_in_place(path: Path) -> None:
    """Give the complete folder `partial_of(path)` the name `path`, and remove the checkpoint that had it.

    No operating system exchanges two folders in every file system. If the process is killed between the two renames,
    the old checkpoint is whole under the name `before`.
    """
    partial, old = partial_of(path), path.with_name(before(path.name))
    with (partial / META).open("rb+") as file:
        # The parts and their index are on the disk already.
        os.fsync(file.fileno())
    if path.exists():
        remove(old)
        path.rename(old)
    partial.rename(path)
    remove(old)


def load_parts(path: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Load this rank's parts of the checkpoint `path`; all ranks call this, and may be more or fewer than wrote it.

    Returns:
        Its plain values, and `state_dict` with the names of its weights, of which not all of the model's need be there.
    """
    index = FileSystemReader(path).read_metadata().state_dict_metadata
    names = {name.removeprefix(WEIGHTS) for name in index if name.startswith(WEIGHTS)}
    # Read into the memory of the weights.
    weights = {name: tensor for name, tensor in module.state_dict().items() if name in names}
    load({WEIGHTS.rstrip("."): weights}, checkpoint_id=path)
    for number, optimizer in enumerate(optimizers):
        state = {f"optimizer_{number}": get_optimizer_state_dict(module, optimizer)}
        load(state, checkpoint_id=path)
        options = StateDictOptions(cpu_offload=True)
        set_optimizer_state_dict(module, optimizer, state[f"optimizer_{number}"], options=options)
    checkpoint: dict[str, Any] = torch.load(path / META, map_location="cpu", weights_only=True)
    # Lightning asks whether they were there.
    return {**checkpoint, "state_dict": dict.fromkeys(names), "optimizer_states": []}


def remove(path: Path) -> None:
    """Remove the file or folder `path`, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
