"""Data for the next round of training: a model's failures, as preference rows without a chosen response."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.for_people import write_for_people
from bdpo_pl.evaluation.measures.rates import SuiteResult
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Suite
from bdpo_pl.evaluation.verdict_log import WARNING
from bdpo_pl.statistics import wilson

_MOST_NAMED = 3
_DIGEST = "digest"


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

    Only categories above their suite's own rate count. They are ordered by the lower ends of the rates' 95 % intervals,
    so that a category of one prompt is not before one of many that fail.
    """
    found = [
        Weakness(result.suite, rate.name, rate.failed.value, rate.failed.count)
        for result in results
        for rate in result.categories
        if rate.failed.value > result.overall.failed.value
    ]
    return sorted(found, key=_surely, reverse=True)[:most]


def _surely(weakness: Weakness) -> tuple[float, float, int]:
    low, _ = wilson(round(weakness.rate * weakness.prompts), weakness.prompts)
    return low, weakness.rate, weakness.prompts


def is_untouched(path: Path) -> bool:
    """Return true if `path` holds rows of `write_rows` that nobody has edited, so that they may be replaced."""
    try:
        rows = [json.loads(line) for line in _lines(path)]
        digests = {row.pop(_DIGEST) for row in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return digests <= {_digest(rows)}


def require_untouched(path: Path) -> None:
    """Raise `InputError` if `path` exists and is not as `write_rows` left it."""
    if path.exists() and not is_untouched(path):
        raise InputError(
            f"refine: {path} exists already, and may hold chosen responses that you wrote, or other edits; name "
            "another file"
        )


def write_rows(failures: Iterable[Failure], path: Path) -> Path:
    """Write a row of `fit`'s preference schema for each failure, and return the path of the file.

    `chosen` is null, for you to fill in: `fit` rejects a row without it and names file and line. `rejected` is the
    model's own answer: an unsafe answer, or a refusal of a benign prompt. Every row carries a warning, and a digest of
    all rows, by which an edit is noticed. The path is another name beside `path` if that file exists and has been
    edited, or is being reviewed.

    Raises:
        InputError: the file cannot be written.
    """
    rows: list[dict[str, object]] = [
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
    digest = _digest(rows)
    text = "".join(json.dumps({**row, _DIGEST: digest}, ensure_ascii=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_for_people(path, text, "refine", lambda file: not is_untouched(file))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); name another file for refine") from None


def _digest(rows: Sequence[Mapping[str, object]]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _lines(path: Path) -> list[str]:
    """Return the lines of `path`; texts may hold characters that end a line elsewhere, as U+2028."""
    text = path.read_text(encoding="utf-8")
    return text.removesuffix("\n").split("\n") if text else []
