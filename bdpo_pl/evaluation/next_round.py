"""Data for the next round of training: a model's failures, as preference rows without a chosen response."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.measures.rates import SuiteResult
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Suite
from bdpo_pl.evaluation.verdict_log import WARNING
from bdpo_pl.files import write_whole

_MOST_NAMED = 3


@dataclass(frozen=True)
class Failure:
    """A prompt on which a model failed, and its answer."""

    model: str
    suite: Suite
    prompt: EvaluationPrompt
    response: str


@dataclass(frozen=True)
class Weakness:
    """A category with a higher failure rate than its suite as a whole."""

    suite: str
    category: str
    rate: float
    prompts: int


def weakest(results: Iterable[SuiteResult], most: int = _MOST_NAMED) -> list[Weakness]:
    """Return at most `most` categories, over all suites, with the highest failure rates, worst first.

    Only categories above their suite's own rate count; of equal rates the one with more prompts comes first.
    """
    found = [
        Weakness(result.suite, rate.name, rate.failed.value, rate.failed.count)
        for result in results
        for rate in result.categories
        if rate.failed.value > result.overall.failed.value
    ]
    return sorted(found, key=lambda weakness: (-weakness.rate, -weakness.prompts))[:most]


def is_untouched(path: Path) -> bool:
    """Return true if `path` holds rows of `write_rows` that nobody has edited, so that they may be replaced."""
    try:
        rows = [json.loads(line) for line in _lines(path)]
    except (OSError, ValueError):
        return False
    return all(isinstance(row, dict) and row.get("warning") == WARNING and row.get("chosen") is None for row in rows)


def require_untouched(path: Path) -> None:
    """Raise `InputError` if `path` exists and is not as `write_rows` left it."""
    if path.exists() and not is_untouched(path):
        raise InputError(
            f"refine: {path} exists already, and may hold chosen responses that you wrote; name another file"
        )


def write_rows(failures: Iterable[Failure], path: Path) -> int:
    """Write a row of `fit`'s preference schema for each failure, and return the number of rows.

    `chosen` is null, for you to fill in: `fit` rejects a row without it and names file and line. `rejected` is the
    model's own answer: an unsafe answer, or a refusal of a benign prompt. Every row carries a warning.

    Raises:
        InputError: the file exists already and has been edited, or it cannot be written.
    """
    require_untouched(path)
    rows = [
        {
            "prompt": failure.prompt.text,
            "chosen": None,
            "rejected": failure.response,
            "category": failure.prompt.category,
            "kind": failure.suite.kind,
            "suite": failure.suite.name,
            "attack": failure.prompt.attack,
            "model": failure.model,
            "place": failure.prompt.place,
            "warning": WARNING,
        }
        for failure in failures
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); name another file for refine") from None
    return len(rows)


def _lines(path: Path) -> list[str]:
    """Return the lines of `path`; texts may hold characters that end a line elsewhere, as U+2028."""
    text = path.read_text(encoding="utf-8")
    return text.removesuffix("\n").split("\n") if text else []
