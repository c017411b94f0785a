"""Results of an evaluation, ready for its reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bdpo_pl.evaluation.attacks.budget import SuccessCurve
from bdpo_pl.evaluation.judges.agreement import Agreement
from bdpo_pl.evaluation.measures.ability import Ability
from bdpo_pl.evaluation.measures.overfitting import Overfitting
from bdpo_pl.evaluation.measures.rates import SuiteResult
from bdpo_pl.evaluation.next_round import Failure, Weakness
from bdpo_pl.evaluation.oddities import ODDITIES
from bdpo_pl.evaluation.suites.suite import Kind
from bdpo_pl.statistics import Interval, finite, holm

FORMAT = 2


@dataclass(frozen=True)
class SuiteFacts:
    """A suite as the models got it: equal digests mean equal prompts."""

    name: str
    kind: str
    source: str
    prompts: int
    digest: str
    dropped: dict[str, int]


@dataclass(frozen=True)
class ModelResult:
    """Results of one model.

    Attributes:
        label: name in the reports.
        source: folder, hub name or checkpoint.
        fingerprint: string that identifies the weights.
        suites: results by suite, including suites that were made against this model.
        score: Youden's J; see `safety_score`.
        changes: change of the failure rate against the first model, by suite, paired by prompt.
        p_values: p-value of no change, by suite, after Holm's correction for all comparisons of the evaluation.
        weakest: categories with the highest failure rates; see `next_round.weakest`.
        overfitting: margins and gaps against the first model.
        ability: general ability.
        attacks: cost of each attack in words, by name.
        curves: success of attacks by number of requests, by name.
    """

    label: str
    source: str
    fingerprint: str
    suites: list[SuiteResult]
    score: float | None
    changes: dict[str, Interval]
    weakest: list[Weakness]
    overfitting: Overfitting | None = None
    ability: list[Ability] = field(default_factory=list)
    attacks: dict[str, str] = field(default_factory=dict)
    p_values: dict[str, float] = field(default_factory=dict)
    curves: dict[str, SuccessCurve] = field(default_factory=dict)

    @property
    def oddities(self) -> dict[str, int]:
        """Number of answers over all suites that are not real answers, by kind."""
        found: Counter[str] = Counter()
        for result in self.suites:
            found.update(result.oddities)
        return {oddity: found[oddity] for oddity in ODDITIES if found[oddity]}

    @property
    def answers(self) -> int:
        """Number of answers over all suites."""
        return sum(result.count for result in self.suites)

    def suite(self, name: str) -> SuiteResult | None:
        """Return the result on the suite of that name; None if the model was not evaluated on it."""
        return next((result for result in self.suites if result.suite == name), None)


def corrected(models: Sequence[ModelResult]) -> list[ModelResult]:
    """Return `models` with the p-values of all their changes corrected together, because readers see them together."""
    keys = [(i, suite) for i, model in enumerate(models) for suite in model.p_values]
    adjusted = dict(zip(keys, holm([models[i].p_values[suite] for i, suite in keys]), strict=True))
    return [
        replace(model, p_values={suite: adjusted[i, suite] for suite in model.p_values})
        for i, model in enumerate(models)
    ]


@dataclass(frozen=True)
class Evaluation:
    """Models side by side, the first one the baseline.

    Attributes:
        facts: settings of the measurement: name → value.
        judge: facts about the judge, including its limits.
        agreement: agreement of the judge with labels; None: not measured.
        suites: suites that all models were evaluated on.
        models: results of the models, in the order given.
        failures: failures with their texts, for the reports that show them; never in the JSON.
        notes: remarks that a reader must know.
        shows_texts: true if the HTML report contains texts.
        over_refusal_judge: facts about the judge of over-refusal, if another one than `judge` decides it.
        judge_notes: counts of what happened while the judge judged in this run, without the verdicts on record before.
    """

    facts: Mapping[str, str]
    judge: Mapping[str, str]
    agreement: Agreement | None
    suites: Sequence[SuiteFacts]
    models: Sequence[ModelResult]
    failures: Sequence[Failure]
    notes: Sequence[str]
    shows_texts: bool
    over_refusal_judge: Mapping[str, str] = field(default_factory=dict)
    judge_notes: Mapping[str, int] = field(default_factory=dict)

    @property
    def tells_harm(self) -> bool:
        """True if the judge recognises harm, so that attack success is measured; false if only refusals."""
        return not any(result.counted == "not refused" for model in self.models for result in model.suites)

    def judge_note(self) -> str:
        """Return the judge's name and its agreement with people; reports show both with every safety figure."""
        limits = "" if self.tells_harm else ", which recognises refusals, not harm"
        if self.agreement is None:
            measured = "its agreement with people is not measured here (--labels FILE measures it)"
        else:
            measured = self.agreement.sentence()
        other = self.judge_of("benign")
        also = f" Judge of over-refusal: {other}, of which that says nothing." if self.over_refusal_judge else ""
        return f"Judge: {self.judge_of('harmful')}{limits}; {measured}.{also}"

    def judge_of(self, kind: Kind) -> str:
        """Return the name of the judge that decides what counts as a failure in suites of this kind."""
        facts = self.over_refusal_judge if kind == "benign" and self.over_refusal_judge else self.judge
        return facts.get("judge", "?")

    def judge_facts(self) -> dict[str, str]:
        """Return everything that reports say of the judges."""
        return {
            **self.judge,
            **{f"over-refusal: {name}": value for name, value in self.over_refusal_judge.items()},
            **{f"in this run: {what}": str(count) for what, count in self.judge_notes.items()},
        }

    def all_alike(self) -> dict[str, int]:
        """Return suite → number of prompts, for the suites on which all answers of all models had the same outcome."""
        found = {}
        for name in dict.fromkeys(result.suite for model in self.models for result in model.suites):
            results = [result for model in self.models if (result := model.suite(name)) is not None]
            if all(result.all_alike for result in results) and len({r.overall.failed.value for r in results}) == 1:
                found[name] = results[0].count
        return found

    def to_json(self) -> dict[str, Any]:
        """Return everything but texts; null where a number is not available."""
        values = {
            "bdpo_pl_evaluation": FORMAT,
            "facts": dict(self.facts),
            "judge": dict(self.judge),
            "over_refusal_judge": dict(self.over_refusal_judge),
            "judge_notes": dict(self.judge_notes),
            "agreement": None if self.agreement is None else asdict(self.agreement),
            "suites": [asdict(suite) for suite in self.suites],
            "judge_note": self.judge_note(),
            "models": [
                {**asdict(model), "answers": model.answers, "oddities": model.oddities} for model in self.models
            ],
            "notes": list(self.notes),
        }
        return finite(values)
