"""Files that people complete: an evaluation never replaces what they wrote, not even while it runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from bdpo_pl.files import write_whole
from bdpo_pl.reviewing.rows import InUseError, held


def write_for_people(
    path: Path, text: str, option: str, is_edited: Callable[[Path], bool], *, private: bool = False
) -> Path:
    """Write `text` to `path`, or to the next free name beside it if people have edited that file or review it now.

    Args:
        path: file to replace; it need not exist.
        text: content of the file.
        option: option that names the file, for messages.
        is_edited: function that returns true if an existing file may hold work of people.
        private: true to make the file readable only by its owner.

    Returns:
        Path of the file that was written; another one than `path` is logged.

    Raises:
        InputError: the folder cannot be written.
        OSError: the disk is full.
    """
    number, target = 1, path
    while True:
        with suppress(InUseError), held(target):
            if not target.exists() or (number == 1 and not is_edited(target)):
                write_whole(target, text, private=private)
                break
        number += 1
        target = path.with_name(f"{path.stem}-{number}{path.suffix}")
    if target != path:
        rank_zero_info(
            f"{option}: {path} has been edited or opened for review since the start, so it is kept; the new rows are "
            f"in {target}"
        )
    return target
