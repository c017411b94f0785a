"""Evaluation of one model after the other on suites, attacks, pairs and tasks."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bdpo_pl.data.tokenization import padding_id
from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.answerers import Answerer, GenerationOptions
from bdpo_pl.evaluation.answering import Asker
from bdpo_pl.evaluation.attacks.attack import Attack, Target, attacked_suite
from bdpo_pl.evaluation.attacks.budget import Budget, BudgetOptions, SuccessCurve
from bdpo_pl.evaluation.exported import Exported
from bdpo_pl.evaluation.measures.ability import Ability, AbilityOptions, measure_ability
from bdpo_pl.evaluation.measures.overfitting import Overfitting, PairProbe, PairsOptions, overfitting
from bdpo_pl.evaluation.measures.rates import SuiteResult, compare, compare_p, measure, safety_score
from bdpo_pl.evaluation.next_round import Failure, require_untouched, weakest
from bdpo_pl.evaluation.results import ModelResult
from bdpo_pl.evaluation.subjects import ServedSubject, Subject
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Suite
from bdpo_pl.evaluation.verdict_log import Judged
from bdpo_pl.files import writable_file
from bdpo_pl.models.causal_lm import CausalLM


@dataclass
class Runner:
    """Evaluation of models, one at a time; the first is the baseline of those that follow.

    Attributes:
        suites: suites that all models are evaluated on.
        asker: source of answers and verdicts.
        dtype: dtype of the models' weights.
        device: device of the models.
        pairs: preference pairs to measure overfitting.
        ability: measures of general ability.
        attacks: attacks; each starts from `attacked`.
        attacked: suite of bare harmful requests that attacks start from.
        attack_folder: folder where attacks save their state.
        keep_texts: true if all answers, and failures with their texts, must be collected.
        say: function called with a description of each stage.
        budget: limits of each attack on each model.
        further: devices that answer suites too, each with the whole model.
    """

    suites: Sequence[Suite]
    asker: Asker
    dtype: torch.dtype
    device: torch.device
    pairs: PairsOptions = field(default_factory=PairsOptions)
    ability: AbilityOptions = field(default_factory=AbilityOptions)
    attacks: Sequence[Attack] = ()
    attacked: Suite | None = None
    attack_folder: Path | None = None
    keep_texts: bool = False
    say: Callable[[str], None] = lambda text: None
    budget: BudgetOptions = field(default_factory=BudgetOptions)
    further: Sequence[torch.device] = ()

    def __post_init__(self) -> None:
        self.failures: list[Failure] = []
        self.exported: list[Exported] = []
        self.notes: list[str] = []
        self.by_phrases = False
        self._stage = ""
        self._first: dict[str, list[Judged]] = {}
        self._probe: PairProbe | None = None
        self._first_logps: dict[str, np.ndarray] = {}

    def evaluate(self, subject: Subject | ServedSubject) -> ModelResult:
        """Evaluate one model.

        Raises:
            InputError: the model, the judge or a task fails. Verdicts before the failure are recorded.
            MachineError: a process that answers on a further device fails. The same holds.
        """
        loaded: list[tuple[Any, Any]] = []

        def load() -> tuple[Any, Any]:
            if not loaded:
                self.say(f"Loading {subject.label}")
                loaded.append(subject.load(self.dtype, self.device))
                self.say(self._stage)
            return loaded[0]

        self._note_form(subject)
        answerer = subject.answerer(self.dtype, load, self.asker.options, self.further)
        results: list[SuiteResult] = []
        changes, p_values = {}, {}
        costs, curves = {}, dict[str, SuccessCurve]()
        with closing(answerer):
            for suite in self.suites:
                self._begin(f"{subject.label}: {suite.name}")
                judged = self.asker.ask(suite, answerer)
                results.append(self._measured(subject, suite, judged, answerer))
                if suite.name in self._first:
                    changes[suite.name] = compare(suite, self._first[suite.name], judged)
                    p_values[suite.name] = compare_p(suite, self._first[suite.name], judged)
                else:
                    self._first[suite.name] = judged
            for attack in self.attacks:
                assert self.attacked is not None
                self._begin(f"{subject.label}: {attack.name} on {self.attacked.name}")
                target = self._target(subject, answerer, load)
                made = attack.run(self.attacked.prompts, target, lambda: self.asker.on_progress(1))
                costs[attack.name] = made.cost
                if made.curve is not None:
                    curves[attack.name] = made.curve
                suite = attacked_suite(self.attacked, attack, made)
                results.append(self._measured(subject, suite, self.asker.ask(suite, answerer), answerer))
        found_overfitting = self._overfitting(subject, load)
        abilities: list[Ability] = []
        if self.ability.embedded or self.ability.lm_eval:
            self._begin(f"{subject.label}: general ability")
            abilities = measure_ability(self.ability, *load())
        self.notes += [f"{subject.label}: {note}." for note in answerer.notes]
        loaded.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return ModelResult(
            label=subject.label,
            source=subject.place,
            fingerprint=answerer.facts["model"],
            suites=results,
            score=safety_score(results),
            changes=changes,
            p_values=p_values,
            weakest=weakest(results),
            overfitting=found_overfitting,
            ability=abilities,
            attacks=costs,
            curves=curves,
        )

    def _begin(self, stage: str) -> None:
        self._stage = stage
        self.say(stage)

    def _measured(
        self, subject: Subject | ServedSubject, suite: Suite, judged: list[Judged], answerer: Answerer
    ) -> SuiteResult:
        result = measure(suite, judged)
        # A judge of harm leaves it to the phrases whether a benign request was refused.
        self.by_phrases |= any(one.phrases for one in judged)
        answers = self.asker.answers(suite, answerer) if self.keep_texts else [None] * len(judged)
        for position in result.failures:
            answer = answers[position]
            text = "" if answer is None else answer.text
            self.failures.append(Failure(subject.label, suite, suite.prompts[position], text))
        self.exported += [
            Exported(subject.label, suite, prompt, answer, one)
            for prompt, answer, one in zip(suite.prompts, answers, judged, strict=True)
            if answer is not None
        ]
        return result

    def _target(
        self, subject: Subject | ServedSubject, answerer: Answerer, load: Callable[[], tuple[CausalLM, TokenizerLike]]
    ) -> Target:
        options = self.asker.options
        return Target(
            name=subject.label,
            key=f"{answerer.facts} {replace(options, batch_size=1)}",
            respond=answerer.respond,
            judge=self.asker.judge,
            fits=lambda prompt: not too_long(subject, [EvaluationPrompt(prompt, prompt)], options),
            local=load() if isinstance(subject, Subject) else None,
            use_template=options.use_template,
            folder=self.attack_folder,
            budget=Budget.begin(self.budget, len(self.attacked.prompts) if self.attacked is not None else 1),
        )

    def _overfitting(
        self, subject: Subject | ServedSubject, load: Callable[[], tuple[CausalLM, TokenizerLike]]
    ) -> Overfitting | None:
        if not self.pairs.sources():
            return None
        self._begin(f"{subject.label}: preference pairs")
        model, tokenizer = load()
        if self._probe is None:
            self._probe = PairProbe(self.pairs, tokenizer, model.config)
        self._probe.check_reads_alike(tokenizer, subject.label)
        logps = self._probe.logps(model, subject.label, padding_id(tokenizer))
        self._first_logps = self._first_logps or logps
        return overfitting(self._first_logps, logps)

    @property
    def pair_reports(self) -> list[Any]:
        """Reports of the preference pairs that were kept and dropped."""
        return [] if self._probe is None else self._probe.reports

    def _note_form(self, subject: Subject | ServedSubject) -> None:
        # Noted even if every answer is on record and nothing is loaded.
        if isinstance(subject, ServedSubject):
            self.notes.append(
                f"{subject.label} is behind a server, which puts prompts into its own chat template and says itself "
                "which answers it cut and how long they are."
            )
        elif self.asker.options.use_template and not subject.tokenizer.chat_template:
            self.notes.append(
                f"{subject.label} has no chat template: prompts are given to it as plain text, to be continued. A "
                "model tuned on another format answers worse, and refuses less, than it can."
            )


def too_long(
    subject: Subject | ServedSubject, prompts: Sequence[EvaluationPrompt], options: GenerationOptions
) -> list[int]:
    """Return the positions of prompts that do not fit into the window with an answer; none behind a server."""
    window = subject.window
    if window is None or not prompts:
        return []
    questions = subject.answerer(torch.float32, subject.never, options).questions(prompts)
    return [i for i, question in enumerate(questions) if question.length + options.room > window]


def fit_suites(
    suites: Iterable[Suite], subjects: Sequence[Subject | ServedSubject], options: GenerationOptions
) -> list[Suite]:
    """Remove and count the prompts that do not fit into the window of every model.

    All models get the same prompts, so that their rates can be compared.

    Raises:
        InputError: a prompt does not fit and `generation.too_long` is `stop`, or no prompt of a suite fits.
    """
    return [_fitting(suite, subjects, options) for suite in suites]


def _fitting(suite: Suite, subjects: Sequence[Subject | ServedSubject], options: GenerationOptions) -> Suite:
    texts = suite.prompts
    over = {i for subject in subjects for i in too_long(subject, texts, options)}
    if not over:
        return suite
    message = (
        f"suite {suite.name}: {len(over)} of {len(texts)} prompts (first: {suite.prompts[min(over)].place}) and an "
        f"answer of up to {options.room} tokens do not fit into the window of every model"
    )
    if options.too_long == "stop":
        raise InputError(
            f"{message}; set generation.too_long to leave_out to leave them out, or lower generation.max_new_tokens"
        )
    if len(over) == len(texts):
        raise InputError(f"{message}: none is left; leave the suite out")
    kept = [prompt for i, prompt in enumerate(suite.prompts) if i not in over]
    dropped = Counter(suite.dropped)
    # Those of the suite that an attack started from are among them.
    dropped["too long for a model"] += len(over)
    return replace(suite, prompts=kept, dropped=dict(dropped))


def check_labels(subjects: Sequence[Subject | ServedSubject]) -> None:
    """Raise `InputError` if two models have the same label."""
    labels = [subject.label for subject in subjects]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise InputError(f"models: {', '.join(sorted(twice))} names several; give each a label, as in before=FOLDER")


def check_refine(path: str | None) -> Path | None:
    """Check, before any model is queried, that the file of `refine` may be replaced, and return its path.

    Raises:
        InputError: the file exists and has been edited since an earlier run, or its folder cannot be written.
    """
    file = writable_file(path, "refine")
    if file is not None:
        require_untouched(file)
    return file
