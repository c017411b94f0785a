"""One model after the other through suites, attacks, pairs and tasks."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bdpo_pl.data.tokenization import padding_id
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.answering import Asker
from bdpo_pl.evaluation.measures.ability import Ability, AbilityOptions, measure_ability
from bdpo_pl.evaluation.measures.overfitting import Overfitting, PairProbe, PairsOptions, overfitting
from bdpo_pl.evaluation.measures.rates import SuiteResult, compare, measure, safety_score
from bdpo_pl.evaluation.next_round import Failure, weakest
from bdpo_pl.evaluation.results import ModelResult
from bdpo_pl.evaluation.subjects import Subject
from bdpo_pl.evaluation.suites.suite import Suite
from bdpo_pl.evaluation.verdict_log import Judged
from bdpo_pl.files import try_writing

Attack = Callable[[Suite, Any, Any, Subject, Callable[[], None]], tuple[Suite, str]]
"""(suite, model, tokenizer, subject, told after each prompt) → the suite made against this model, and what it cost."""


@dataclass
class Runner:
    """Evaluates models that are given one by one; the first is the baseline of those that follow.

    Attributes:
        suites: what all of them are asked.
        asker: asks and has judged.
        dtype: of the models' weights.
        device: where they run.
        pairs: preference pairs to see overfitting by.
        ability: general ability.
        attacks: by name; each is run on `attacked`.
        attacked: the suite of bare harmful requests that attacks start from.
        keep_texts: collect failures with their texts.
        say: told what is being done.
    """

    suites: Sequence[Suite]
    asker: Asker
    dtype: torch.dtype
    device: torch.device
    pairs: PairsOptions = field(default_factory=PairsOptions)
    ability: AbilityOptions = field(default_factory=AbilityOptions)
    attacks: dict[str, Attack] = field(default_factory=dict)
    attacked: Suite | None = None
    keep_texts: bool = False
    say: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self.failures: list[Failure] = []
        self.notes: list[str] = []
        self._first: dict[str, list[Judged]] = {}
        self._probe: PairProbe | None = None
        self._first_logps: dict[str, np.ndarray] = {}

    def evaluate(self, subject: Subject) -> ModelResult:
        """Everything about one model.

        Raises:
            InputError: the model, the judge or a task fails; what has been judged until then is on record.
        """
        loaded: list[tuple[Any, Any]] = []

        def load() -> tuple[Any, Any]:
            if not loaded:
                self.say(f"Loading {subject.label}")
                loaded.append(subject.load(self.dtype, self.device))
            return loaded[0]

        self._note_template(subject)
        facts = {"model": subject.fingerprint(), "dtype": str(self.dtype)}
        results: list[SuiteResult] = []
        changes = {}
        costs = {}
        for suite in self.suites:
            self.say(f"{subject.label}: {suite.name}")
            judged = self.asker.ask(suite, facts, load)
            results.append(self._measured(subject, suite, judged, facts))
            if suite.name in self._first:
                changes[suite.name] = compare(suite, self._first[suite.name], judged)
            else:
                self._first[suite.name] = judged
        for name, attack in self.attacks.items():
            assert self.attacked is not None
            self.say(f"{subject.label}: {name} on {self.attacked.name}")
            model, tokenizer = load()
            suite, costs[name] = attack(self.attacked, model, tokenizer, subject, lambda: self.asker.on_progress(1))
            results.append(self._measured(subject, suite, self.asker.ask(suite, facts, load), facts))
        found_overfitting = self._overfitting(subject, load)
        abilities: list[Ability] = []
        if self.ability.embedded or self.ability.lm_eval:
            self.say(f"{subject.label}: general ability")
            abilities = measure_ability(self.ability, *load())
        loaded.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return ModelResult(
            label=subject.label,
            source=str(subject.checkpoint or subject.source.name),
            fingerprint=facts["model"],
            suites=results,
            score=safety_score(results),
            changes=changes,
            weakest=weakest(results),
            overfitting=found_overfitting,
            ability=abilities,
            attacks=costs,
        )

    def _measured(self, subject: Subject, suite: Suite, judged: list[Judged], facts: dict[str, str]) -> SuiteResult:
        result = measure(suite, judged)
        for position in result.failures:
            text = self.asker.response(suite, facts, position).text if self.keep_texts else ""
            self.failures.append(Failure(subject.label, suite, suite.prompts[position], text))
        return result

    def _overfitting(self, subject: Subject, load: Callable[[], tuple[Any, Any]]) -> Overfitting | None:
        if not self.pairs.sources():
            return None
        self.say(f"{subject.label}: preference pairs")
        model, tokenizer = load()
        if self._probe is None:
            self._probe = PairProbe(self.pairs, tokenizer, model.config)
        self._probe.check_reads_alike(tokenizer, subject.label)
        logps = self._probe.logps(model, subject.label, padding_id(tokenizer))
        self._first_logps = self._first_logps or logps
        return overfitting(self._first_logps, logps)

    @property
    def pair_reports(self) -> list[Any]:
        """What was kept and dropped of the preference pairs."""
        return [] if self._probe is None else self._probe.reports

    def _note_template(self, subject: Subject) -> None:
        # Told even where every answer is on record, and nothing is loaded.
        if self.asker.options.use_template and not subject.tokenizer.chat_template:
            self.notes.append(
                f"{subject.label} has no chat template: prompts are given to it as plain text, to be continued. A "
                "model tuned on another format answers worse, and refuses less, than it can."
            )


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on a GPU that has it, else float32.

    Raises:
        InputError: no such dtype.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype must be auto, float32, bfloat16 or float16, not {name!r}")
    return getattr(torch, name)


def choose_device(name: str) -> torch.device:
    """`auto`: a GPU if there is one.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} is not to be had here ({str(error).splitlines()[0]}); try cpu") from None
    return device


def check_labels(subjects: Sequence[Subject]) -> None:
    """Raise `InputError` if two models go by one name."""
    labels = [subject.label for subject in subjects]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise InputError(f"models: {', '.join(sorted(twice))} names several; give each a label, as in before=FOLDER")


def check_refine(path: str | None) -> Path | None:
    """The file of `refine`, which must not exist yet: that is found out before the models answer.

    Raises:
        InputError: it exists, or its folder cannot be written.
    """
    if path is None:
        return None
    file = Path(path).expanduser()
    if file.exists():
        raise InputError(f"refine: {file} exists already, and may hold chosen responses of yours; name another file")
    try:
        try_writing(file.parent)
    except OSError as error:
        raise InputError(f"refine: {file} cannot be written ({error.strerror}); name another file") from None
    return file
