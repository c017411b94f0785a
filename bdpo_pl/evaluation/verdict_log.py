"""Record of answers and verdicts on disk, from which an interrupted evaluation resumes.

It is one JSONL file. Its first line states the format. Verdicts are always kept. Answers of models are kept only if
the user requested it, under a warning.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.judges.judge import Verdict
from bdpo_pl.files import write_whole
from bdpo_pl.forward.generation import Response

WARNING = (
    "This file holds answers of language models to harmful requests. They may be harmful, offensive or false: do not "
    "publish them, and delete the file when you are done with it."
)
_FORMAT = 2


@dataclass(frozen=True)
class Answer(Response):
    """A model's answer, separate from its thought.

    Attributes:
        thought: the model's thought before the answer.
        unfinished_thought: true if the model was still thinking when it was cut off or ended; then there is no answer.
    """

    thought: str = ""
    unfinished_thought: bool = False


@dataclass(frozen=True)
class Judged:
    """A verdict, and the properties of the answer other than its text.

    Attributes:
        verdict: the judge's verdict.
        num_tokens: length of the answer in tokens.
        finished: true if the model ended the answer by itself.
        oddities: kinds of oddities; see `bdpo_pl.evaluation.oddities`.
        phrases: digest of the phrases, if they and not the judge decided whether the answer refuses; empty: the judge.
    """

    verdict: Verdict
    num_tokens: int
    finished: bool
    oddities: tuple[str, ...] = ()
    phrases: str = ""


def key_of(facts: Mapping[str, object]) -> str:
    """Return a short digest of everything that an answer or a verdict depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:24]


class RecordFile:
    """Answers and verdicts by key. A context manager; every record is on disk when `add_…` returns.

    Args:
        path: the file; its records are read if it exists.
        keep_answers: true if the answers of models are written too.

    Raises:
        InputError: the file is of another kind, has a damaged line, or cannot be written.
    """

    def __init__(self, path: Path, keep_answers: bool) -> None:
        self.path = path
        self.keep_answers = keep_answers
        self._answers: dict[str, Answer] = {}
        self._verdicts: dict[tuple[str, str], Judged] = {}
        self._lines = self._read()

    def __enter__(self) -> RecordFile:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Rewritten, so that a partial line at the end of a killed run is removed and the warning is at the head.
            head: dict[str, Any] = {"bdpo_pl_evaluation": _FORMAT}
            if self.keep_answers or self._answers:
                head["warning"] = WARNING
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in (head, *self._lines)))
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({error.strerror}); set folder to one that can") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def answer(self, key: str) -> Answer | None:
        """Return the answer of this key; None if it was not kept."""
        return self._answers.get(key)

    def verdict(self, key: str, judge: str) -> Judged | None:
        """Return the verdict of `judge` on the answer `key`; None if there is none."""
        return self._verdicts.get((key, judge))

    def add_answer(self, key: str, answer: Answer) -> None:
        """Keep an answer in memory, and write it to the file if answers are kept."""
        self._answers[key] = answer
        if self.keep_answers:
            self._write({"answer": key, **asdict(answer)})

    def add_verdict(self, key: str, judge: str, judged: Judged) -> None:
        """Write a verdict to the file."""
        self._verdicts[key, judge] = judged
        self._write(
            {
                "judged": key, "judge": judge, **asdict(judged.verdict),
                "num_tokens": judged.num_tokens, "finished": judged.finished, "oddities": judged.oddities,
                "phrases": judged.phrases,
            }
        )  # fmt: skip

    def _write(self, line: Mapping[str, object]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        found = []
        for number, line in enumerate(lines, start=1):
            # A complete line ends with a line break; anything after the last one was cut off. The first line is never
            # cut off.
            if not line.strip() or number == len(lines) > 1:
                continue
            try:
                record = json.loads(line)
                if number == 1:
                    self._check_format(record["bdpo_pl_evaluation"])
                    continue
                self._take(record)
            except InputError:
                raise
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{self.path}, line {number}: not a record of an evaluation; remove the line, or the file to "
                    "evaluate again"
                ) from None
            found.append(record)
        return found

    def _check_format(self, version: int) -> None:
        if version != _FORMAT:
            raise InputError(
                f"{self.path} was written by another version of bdpo_pl (format {version}, here {_FORMAT}); remove it "
                "to evaluate again, or set folder to another one"
            )

    def _take(self, record: dict[str, Any]) -> None:
        if "answer" in record:
            self._answers[record["answer"]] = Answer(
                record["text"],
                record["num_tokens"],
                record["finished"],
                record["thought"],
                record["unfinished_thought"],
            )
            return
        verdict = Verdict(record["refused"], record["unsafe"], record["score"])
        # Where both are known and an earlier version does not say by whom, the phrases may have decided one.
        phrases = record.get("phrases", "" if None in (verdict.refused, verdict.unsafe) else "unknown")
        self._verdicts[record["judged"], record["judge"]] = Judged(
            verdict, record["num_tokens"], record["finished"], tuple(record["oddities"]), phrases
        )
