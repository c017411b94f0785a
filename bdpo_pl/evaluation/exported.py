"""Export of prompts, answers and verdicts to a file, for reading, for labelling and for measuring judges."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Suite
from bdpo_pl.evaluation.verdict_log import WARNING, Answer, Judged
from bdpo_pl.files import writable_file, write_whole
from bdpo_pl.reporting.format import whole


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
    if file is not None and file.exists() and (labels := _count_labels(file)):
        raise InputError(
            f"export_answers: {file} exists already, with {whole(labels)} labels that people wrote; name another file"
        )
    return file


def _count_labels(file: Path) -> int:
    labels = 0
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        # Lines that are something else are of no export.
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            labels += isinstance(row, dict) and bool(row.get("label"))
    return labels


def write_answers(rows: Iterable[Exported], judge: str, path: Path) -> int:
    """Write a JSONL row for each answer, and return the number of rows.

    `label` is null, for people to fill in with `refusal` or `compliance`: `--labels` then measures any judge on the
    file; rows without a label are left out and counted. `prompt` is the bare request, as judges get it.
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
    write_whole(path, "".join(lines), private=True)
    return len(lines)
