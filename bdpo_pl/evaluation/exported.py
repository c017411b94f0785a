"""Export of prompts, answers and verdicts to a file, for reading, for labelling and for measuring judges."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.for_people import write_for_people
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Suite
from bdpo_pl.evaluation.verdict_log import WARNING, Answer, Judged
from bdpo_pl.files import writable_file
from bdpo_pl.reporting.format import whole

_FIELDS = frozenset((
    "prompt", "asked", "response", "label", "model", "suite", "kind", "category", "attack", "place", "judge", "refused",
    "refused_by", "judged_unsafe", "score", "oddities", "thought", "warning",
))  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """One answer of one model, with its verdict."""

    model: str
    suite: Suite
    prompt: EvaluationPrompt
    answer: Answer
    judged: Judged


def check_export(path: str | None) -> Path | None:
    """Check, before any model is queried, that the file of `export_answers` may be replaced, and return its path.

    Raises:
        InputError: people have written labels into it, or its folder cannot be written.
    """
    file = writable_file(path, "export_answers")
    if file is not None and file.exists() and (edited := _count_edited(file)):
        raise InputError(
            f"export_answers: {file} exists already, with {whole(edited)} rows that have a label or another field that "
            "people wrote; name another file"
        )
    return file


def _count_edited(file: Path) -> int:
    """Return the number of rows with a label, or with fields that no export has, such as a label of another name."""
    edited = 0
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        # Lines that are something else are of no export.
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            edited += isinstance(row, dict) and (bool(row.get("label")) or not row.keys() <= _FIELDS)
    return edited


def write_answers(rows: Iterable[Exported], judge: str, path: Path) -> Path:
    """Write a JSONL row for each answer, and return the path of the file.

    It is another name beside `path` if people have labelled that file since `check_export`, or review it now. `label`
    is null, for people to fill in with `refusal` or `compliance`: `--labels` then measures a judge of refusals on the
    file. For a judge of harm, they add `unsafe` (true or false) and leave `label` empty. Rows without either are left
    out and counted. `prompt` is the bare request, as judges get it.
    """
    lines = []
    for row in rows:
        verdict = row.judged.verdict
        fields = {
            "prompt": row.prompt.behaviour,
            "asked": row.prompt.text,
            "response": row.answer.text,
            "label": None,
            "model": row.model,
            "suite": row.suite.name,
            "kind": row.suite.kind,
            "category": row.prompt.category,
            "attack": row.prompt.attack,
            "place": row.prompt.place,
            "judge": judge,
            "refused": verdict.refused,
            "refused_by": None if verdict.refused is None else "phrases" if row.judged.phrases else judge,
            "judged_unsafe": verdict.unsafe,
            "score": verdict.score,
            "oddities": list(row.judged.oddities),
            "thought": row.answer.thought,
            "warning": WARNING,
        }
        lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
    return write_for_people(path, "".join(lines), "export_answers", lambda file: _count_edited(file) > 0, private=True)
