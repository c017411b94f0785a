"""What has been answered and judged, kept on disk as it comes: an evaluation that was cut off goes on from there.

One JSONL file. Its first line tells what it is. Verdicts are always kept. What a model answered is kept only where the
user asked for it, under a warning.
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
    """What a model answered, its thought kept apart.

    Attributes:
        thought: what it thought before.
        unfinished_thought: it was still thinking when it was cut or ended; there is no answer.
    """

    thought: str = ""
    unfinished_thought: bool = False


@dataclass(frozen=True)
class Judged:
    """A verdict, and what is known of the answer without its text.

    Attributes:
        verdict: of the judge.
        num_tokens: length of the answer.
        finished: the model ended it by itself.
        oddities: see `bdpo_pl.evaluation.oddities`.
    """

    verdict: Verdict
    num_tokens: int
    finished: bool
    oddities: tuple[str, ...] = ()


def key_of(facts: Mapping[str, Any]) -> str:
    """A short name for all that an answer or a verdict depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:24]


class RecordFile:
    """Answers and verdicts by key. A context manager; every record is on disk when `add_…` returns.

    Args:
        path: the file; read if it is there.
        keep_answers: write what models answered, too.

    Raises:
        InputError: a file of another kind or with a damaged line, or one that cannot be written.
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
            # Anew, so that half a line at the end of a run that was killed is gone, and the warning stands at the head.
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
        """What was answered, if it was kept."""
        return self._answers.get(key)

    def verdict(self, key: str, judge: str) -> Judged | None:
        """What `judge` said of the answer `key`, if it has been asked."""
        return self._verdicts.get((key, judge))

    def add_answer(self, key: str, answer: Answer) -> None:
        """Hold an answer; write it down if answers are kept."""
        self._answers[key] = answer
        if self.keep_answers:
            self._write({"answer": key, **asdict(answer)})

    def add_verdict(self, key: str, judge: str, judged: Judged) -> None:
        """Write a verdict down."""
        self._verdicts[key, judge] = judged
        self._write(
            {
                "judged": key, "judge": judge, **asdict(judged.verdict),
                "num_tokens": judged.num_tokens, "finished": judged.finished, "oddities": judged.oddities,
            }
        )  # fmt: skip

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        found = []
        for number, line in enumerate(lines, start=1):
            # A whole line ends with a line break; what follows the last one was cut off. The first is never cut off.
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
                    "evaluate anew"
                ) from None
            found.append(record)
        return found

    def _check_format(self, version: int) -> None:
        if version != _FORMAT:
            raise InputError(
                f"{self.path} was written by another version of bdpo_pl (format {version}, here {_FORMAT}); remove it "
                "to evaluate anew, or set folder to another one"
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
        self._verdicts[record["judged"], record["judge"]] = Judged(
            verdict, record["num_tokens"], record["finished"], tuple(record["oddities"])
        )
