"""The file of sample completions of a run, which goes on where the checkpoint of a resumed run was written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from bdpo_pl.errors import MachineError
from bdpo_pl.files import write_whole

WARNING = (
    "These texts are prompts and responses of the data and completions of a model. They may be harmful, private or "
    "false: do not publish them."
)


@dataclass(frozen=True)
class Row:
    """One completion.

    Attributes:
        step: optimiser step after which it was generated; 0: before training.
        set: `held_out`, or suite of the safety probe (`harmful`, `jailbreak`, `benign`).
        place: file and row of the prompt.
        prompt: prompt as the model reads it; of the safety probe, the text within the user's turn.
        completion: completion by the policy, without special tokens.
        num_tokens: number of generated tokens; None for the safety probe.
        finished: true if the policy ended it by itself; None for the safety probe.
        chosen: the data's chosen response; None without pairs.
        rejected: the data's rejected response; None without pairs.
        answer: the data's single answer; None for pairs.
        label: true if the single answer is good; None for pairs.
        refused: true if the completion is a refusal by its phrases; None outside the safety probe.
        warning: warning about the texts.
    """

    step: int
    set: str
    place: str
    prompt: str
    completion: str
    num_tokens: int | None = None
    finished: bool | None = None
    chosen: str | None = None
    rejected: str | None = None
    answer: str | None = None
    label: bool | None = None
    refused: bool | None = None
    warning: str = WARNING

    def fields(self) -> dict[str, Any]:
        """Return the known fields by name, without the warning."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "warning"}


class CompletionsFile:
    """`completions.jsonl` in the folder of a run, written by the first rank.

    Attributes:
        num_rows: number of rows in it.
        digest: digest of these rows.
    """

    NAME = "completions.jsonl"

    def __init__(self) -> None:
        self.num_rows = 0
        self.digest = _digest([])
        self._path: Path | None = None

    def take_up(self, num_rows: int, digest: str) -> None:
        """Continue from a checkpoint with `num_rows` rows of this digest, before `begin`."""
        self.num_rows, self.digest = num_rows, digest

    def begin(self, trainer: L.Trainer) -> None:
        """Keep the rows from before the checkpoint if they are in the run's folder, else begin with an empty file.

        All ranks call this; later calls do nothing. Runs with some loggers share a folder, and the digest tells their
        files apart.
        """
        if self._path is not None:
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        self._path = folder / self.NAME
        if not trainer.is_global_zero:
            return
        lines = _lines(self._path)[: self.num_rows]
        if _digest(lines) != self.digest:
            if self._path.is_file():
                rank_zero_warn(
                    f"{self._path} does not hold the rows from before the checkpoint, so it is emptied and gets "
                    "only the rows from here on"
                )
            lines = []
        self.num_rows, self.digest = len(lines), _digest(lines)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, "".join(line + "\n" for line in lines), private=True)

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows to the end of the file.

        Raises:
            MachineError: the disk is full.
        """
        assert self._path is not None
        lines = [json.dumps(asdict(row), ensure_ascii=False) for row in rows]
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise MachineError(f"{self._path} cannot be written ({error.strerror}); free space and resume") from error
        self.num_rows, self.digest = self.num_rows + len(rows), _digest(lines, self.digest)


def read_rows(folder: Path) -> list[Row]:
    """Return the rows of `completions.jsonl` in `folder`; none if there is no file."""
    return [Row(**json.loads(line)) for line in _lines(folder / CompletionsFile.NAME)]


def _digest(lines: Sequence[str], before: str = "") -> str:
    """Return a digest of rows that follow those of the digest `before`."""
    for line in lines:
        before = hashlib.sha256(f"{before}\n{line}".encode()).hexdigest()
    return before


def _lines(path: Path) -> list[str]:
    """Return the complete lines of a file; none if there is no file."""
    # `splitlines` would split at characters that JSON leaves in a text, such as U+2028.
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
