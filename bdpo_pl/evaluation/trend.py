"""Rates of several evaluations, oldest first: `python -m bdpo_pl.evaluation.trend evaluation.json ...`.

The files are those that `bdpo_pl.evaluate` writes, in the order given. The command prints a Markdown table with a line
for each model of each file. Rates can only be compared if they have the same prompts, judge and settings, so a cell
that differs from the last file in one of these says in which.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.gates import table_row
from bdpo_pl.evaluation.results import FORMAT
from bdpo_pl.reporting.format import fixed, share

_SETTINGS = ("responses", "weights")
# Written only if they are not as by default; files of earlier versions have none of them.
_VARIED = ("thoughts", "chat template's variables", "temperature of servers")
# Earlier versions counted these among the judge's facts.
_COUNTED = ("blank answers", "asked again", "cut to the judge's length")


@dataclass(frozen=True)
class Run:
    """An evaluation on disk.

    Attributes:
        place: name of the file.
        models: label and score (None if it was not measured) of each model.
        cells: formatted rate by number of the model and name of the suite.
        counted: kind of failure of each suite.
        prompts: digest of the prompts of each suite; suites that an attack made have none.
        judge: facts of the judge.
        over_refusal_judge: facts of the judge of over-refusal, if it is another one.
        settings: settings of the generation.
    """

    place: str
    models: list[tuple[str, float | None]]
    cells: dict[tuple[int, str], str]
    counted: dict[str, str]
    prompts: dict[str, str]
    judge: Mapping[str, str]
    over_refusal_judge: Mapping[str, str]
    settings: list[str]

    def differs(self, other: Run, suite: str) -> list[str]:
        """Return in what this run's rate of `suite` was measured differently from the rate of `other`."""
        mine, theirs = self.prompts.get(suite), other.prompts.get(suite)
        judges = [
            (run.judge, run.over_refusal_judge if run.counted.get(suite) == "over-refusal" else {})
            for run in (self, other)
        ]
        return [
            what
            for what, is_other in (
                ("judge", judges[0] != judges[1]),
                ("settings", self.settings != other.settings),
                ("prompts", mine != theirs or mine is None),
            )
            if is_other
        ]

    def score_differs(self, other: Run) -> list[str]:
        """Return in what this run's scores, which all suites make up, were measured differently from `other`'s."""
        common = self.counted.keys() & other.counted.keys()
        found = {what for suite in common for what in self.differs(other, suite)}
        if common != self.counted.keys() | other.counted.keys():
            found.add("suites")
        return sorted(found)


def read_run(path: Path) -> Run:
    """Read an `evaluation.json`.

    Raises:
        InputError: it cannot be read, or is no evaluation of this format.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found["bdpo_pl_evaluation"]
        if version != FORMAT:
            raise InputError(
                f"{path} was written by another version of bdpo_pl (format {version}, here {FORMAT}); evaluate again"
            )
        rates = {
            (i, result["suite"]): share(*(result["overall"]["failed"][end] for end in ("value", "low", "high")))
            for i, model in enumerate(found["models"])
            for result in model["suites"]
        }
        return Run(
            place=path.parent.name if path.name == "evaluation.json" else path.stem,
            models=[(model["label"], model["score"]) for model in found["models"]],
            cells=rates,
            counted={result["suite"]: result["counted"] for model in found["models"] for result in model["suites"]},
            prompts={suite["name"]: suite["digest"] for suite in found["suites"]},
            judge={name: fact for name, fact in found["judge"].items() if not (name in _COUNTED and fact.isdecimal())},
            over_refusal_judge=found.get("over_refusal_judge", {}),
            settings=[
                *(found["facts"][name] for name in _SETTINGS),
                *(found["facts"].get(name, "") for name in _VARIED),
            ],
        )
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give files that bdpo_pl.evaluate wrote") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no evaluation.json of bdpo_pl.evaluate") from None


def trend(runs: Sequence[Run]) -> Iterator[str]:
    """Yield the lines of a Markdown table of `runs`, which are given oldest first."""
    last = runs[-1]
    suites = list(dict.fromkeys(suite for run in reversed(runs) for suite in run.counted))
    scored = any(score is not None for run in runs for _, score in run.models)
    counted = {suite: kind for run in runs for suite, kind in run.counted.items()}
    yield table_row(["run", "model", *(f"{suite}, {counted[suite]}" for suite in suites), *(["score"] * scored)])
    yield table_row(["---"] * (2 + len(suites) + scored))
    for run in runs:
        for i, (label, score) in enumerate(run.models):
            cells = [_cell(run, last, i, suite) for suite in suites]
            yield table_row([run.place, label, *cells, *([_score(run, last, score)] * scored)])


def _cell(run: Run, last: Run, model: int, suite: str) -> str:
    if (model, suite) not in run.cells:
        return "–"
    others = run.differs(last, suite) if run is not last and suite in last.counted else []
    return _marked(run.cells[model, suite], others)


def _score(run: Run, last: Run, score: float | None) -> str:
    return "–" if score is None else _marked(fixed(score, 3), [] if run is last else run.score_differs(last))


def _marked(value: str, others: Sequence[str]) -> str:
    return value + (f", other {' and '.join(others)}" if others else "")


def main(files: Sequence[str]) -> None:
    """Print the table of the evaluations in `files`."""
    if not files:
        raise InputError("give one or more files evaluation.json, oldest first")
    print("\n".join(trend([read_run(Path(file).expanduser()) for file in files])))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
