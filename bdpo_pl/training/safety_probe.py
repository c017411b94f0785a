"""Safety during training: a small evaluation by refusal phrases before, after and at intervals during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from bdpo_pl.embedded import EMBEDDED
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.measures.rates import youdens_j
from bdpo_pl.evaluation.suites.known import SuiteOptions, known_suites, load_suite
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Kind, Suite
from bdpo_pl.forward.generation import generate_responses
from bdpo_pl.refusals import is_refusal
from bdpo_pl.training.schedule_free import at_average
from bdpo_pl.training.watched import WatchedModule

_PREFIX = "safety/"
SCORE = f"{_PREFIX}score"
"""Mean refusal rate of harmful prompts − over-refusal (Youden's J), as in `bdpo_pl.evaluate`."""

_GAP = "gap/margin"

_KINDS: dict[str, Kind] = {"harmful": "harmful", "jailbreak": "harmful", "benign": "benign"}
_LABELS = {
    "harmful": "refusal rate, harmful prompts",
    "jailbreak": "refusal rate, jailbreak-wrapped prompts",
    "benign": "over-refusal, benign prompts",
}
OnAnswers = Callable[[L.Trainer, str, Sequence[EvaluationPrompt], Sequence[str]], None]
_READ_BY = {"policy", "template", "tokenizer"}
"""Traits of a run on which the policy's answers before training depend."""
_NAMES = {"harmful": "refusal_harmful", "jailbreak": "refusal_jailbreak", "benign": "over_refusal"}


class SafetyProbe(L.Callback):
    """Refusal rates by greedy generation, before and after training, and optionally during it.

    During training it measures at the first validation, and then at one validation every `every_n_steps` optimiser
    steps. It logs `safety/refusal_harmful`, `safety/refusal_jailbreak`, `safety/over_refusal` and, if there are both
    harmful and benign prompts, `safety/score`: `--checkpoint.monitor safety/score --checkpoint.mode max` keeps the
    checkpoint with the best balance of safety and helpfulness.

    Args:
        harmful: requests that should be refused: a file or the name of a suite, as for `bdpo_pl.evaluate`, or
            `embedded`.
        jailbreak: harmful requests in framings that are meant to circumvent refusals, in the same forms.
        benign: requests that should be answered, in the same forms; refusing one is an over-refusal.
        max_new_tokens: maximum number of tokens in a response; a refusal shows early.
        max_prompts: maximum number of prompts of each kind, spread evenly over the source.
        batch_size: number of prompts answered at a time.
        every_n_steps: number of optimiser steps between two measurements. Default: none during training.

    Attributes:
        left_out: changes in a resumed run because of which the rate before training is left out, by the name of the
            suite.
        before: refusal rates before training, by name.
        after: those after training.
        measured: those of each optimiser step at which this run has measured.
        on_answers: function that is called on each rank with the Trainer, a suite's name, this rank's prompts of it and
            the responses to them, at each measurement.

    Raises:
        InputError: the prompts cannot be read, or a number is below 1.
    """

    def __init__(
        self,
        harmful: str | None = None,
        jailbreak: str | None = None,
        benign: str | None = None,
        max_new_tokens: int = 48,
        max_prompts: int = 200,
        batch_size: int = 40,
        every_n_steps: int | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise InputError(f"safety.every_n_steps must be at least 1, got {every_n_steps}")
        given = {"harmful": harmful, "jailbreak": jailbreak, "benign": benign}
        self.suites = {name: _suite(name, spec, max_prompts) for name, spec in given.items() if spec is not None}
        if every_n_steps is not None and not self.suites:
            raise InputError("safety.every_n_steps needs prompts: give safety.harmful, safety.jailbreak, safety.benign")
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.every_n_steps = every_n_steps
        self.left_out: dict[str, str] = {}
        self.on_answers: OnAnswers = lambda *_: None
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.measured: dict[int, dict[str, float]] = {}
        self._latest: dict[str, float] = {}
        self._latest_step: int | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Number of prompts of each rate in `before` and `after`."""
        return {_LABELS[name]: len(suite.prompts) for name, suite in self.suites.items()}

    @property
    def logged(self) -> set[str]:
        """Names of the metrics that are logged during training."""
        if self.every_n_steps is None:
            return set()
        both = {_KINDS[name] for name in self.suites} == {"harmful", "benign"}
        return {f"{_PREFIX}{_NAMES[name]}" for name in self.suites} | ({SCORE} if both else set())

    def check_monitor(self, monitor: str | None, mode: str) -> None:
        """Raise `InputError` if `monitor` is never measured, or if `mode` would choose the worst checkpoint by it."""
        if monitor is None or not monitor.startswith(_PREFIX):
            return
        if monitor not in self.logged:
            needed = {
                SCORE: "harmful and benign prompts with safety.harmful or safety.jailbreak, and safety.benign",
                **{f"{_PREFIX}{value}": f"safety.{name}" for name, value in _NAMES.items()},
            }
            if monitor not in needed:
                raise InputError(f"checkpoint.monitor is {monitor}; there are {', '.join(needed)}")
            raise InputError(
                f"checkpoint.monitor is {monitor}, which is not measured: set safety.every_n_steps, and give "
                f"{needed[monitor]}"
            )
        better = "min" if monitor == f"{_PREFIX}{_NAMES['benign']}" else "max"
        if mode != better:
            raise InputError(
                f"checkpoint.mode is {mode}, by which {monitor} would choose the worst; set checkpoint.mode {better}"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the policy before training."""
        if trainer.global_step == 0:
            self.before, self.left_out = _labelled(self._measure(trainer, pl_module, "before training")), {}
        else:
            self._leave_out_others(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure if it is due; always log the latest rates, so that every checkpoint can be chosen by them."""
        if self.every_n_steps is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        step = trainer.global_step
        if self._latest_step is None or step - self._latest_step >= self.every_n_steps:
            self._latest = self._measure(trainer, pl_module, f"step {step}")
            self._latest_step = step
        values = {f"{_PREFIX}{_NAMES[name]}": rate for name, rate in self._latest.items()}
        if SCORE in self.logged:
            refused = [rate for name, rate in self._latest.items() if _KINDS[name] == "harmful"]
            values[SCORE] = youdens_j(sum(refused) / len(refused), self._latest["benign"])
        # The values are the same on every rank; sync_dist only tells Lightning so.
        pl_module.log_dict(values, sync_dist=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the trained policy."""
        if self._latest_step != trainer.global_step:
            self._latest = self._measure(trainer, pl_module, "after training")
        self.after = _labelled(self._latest)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the policy of a run with no steps left, for which Lightning calls none of the hooks above."""
        if self.suites and not self.after:
            self._leave_out_others(pl_module)
            pl_module.to(trainer.strategy.root_device)
            self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the measurements and what was asked, for a resumed run."""
        measured = {"before": self.before, "latest": self._latest, "latest_step": self._latest_step}
        return {**measured, "asked": self._asked()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the measurements of the same prompts, answered at the same length; say so if there are others."""
        self.before = dict(state_dict["before"])
        self._latest = state_dict["latest"]
        self._latest_step = state_dict["latest_step"]
        for name in (others := self.changed_suites(state_dict)):
            asked, now = (suites.get(name, [None, None]) for suites in (state_dict["asked"], self._asked()))
            self._leave_out(name, f"safety.max_new_tokens {asked[-1]}" if asked[:2] == now[:2] else "other prompts")
        if others or self._latest.keys() != self.suites.keys():
            self._latest, self._latest_step = {}, None

    def changed_suites(self, state_dict: Mapping[str, Any]) -> list[str]:
        """Return the names of the suites that are not asked as they were where `state_dict` was saved."""
        now = self._asked()
        # Checkpoints of an earlier version do not say what was asked.
        asked = state_dict.get("asked", now)
        return sorted(name for name in now.keys() | asked.keys() if now.get(name) != asked.get(name))

    def _asked(self) -> dict[str, list[Any]]:
        """Return, of each suite, what its rate depends on besides the policy."""
        return {name: [suite.digest, len(suite.prompts), self.max_new_tokens] for name, suite in self.suites.items()}

    def _leave_out_others(self, pl_module: L.LightningModule) -> None:
        """Leave out rates from before a change by which the policy would have answered otherwise."""
        assert isinstance(pl_module, WatchedModule)
        if changed := sorted(_READ_BY.intersection(pl_module.changed_measures)):
            for name in self.suites:
                self._leave_out(name, ", ".join(changed))
            self._latest, self._latest_step = {}, None

    def _leave_out(self, name: str, why: str) -> None:
        if self.before.pop(_LABELS[name], None) is not None and name in self.suites:
            self.left_out[name] = why
            rank_zero_info(f"The checkpoint's {_LABELS[name]}, before training is left out: it was of {why}")

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, when: str) -> dict[str, float]:
        """Return the share of refusals in each suite; ranks with whole models divide the prompts."""
        if not self.suites:
            return {}
        count = sum(len(suite.prompts) for suite in self.suites.values())
        rank_zero_info(f"Generating responses to {count} prompts ({when})")
        assert isinstance(pl_module, WatchedModule)
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        # Ranks with parts of one model run it together, on the same prompts.
        together = isinstance(trainer.strategy, ModelParallelStrategy)
        rank, ranks = (0, 1) if together else (trainer.global_rank, trainer.world_size)
        rates = {}
        for name, suite in self.suites.items():
            prompts = suite.prompts[rank::ranks]
            with trainer.precision_plugin.forward_context(), at_average(trainer.optimizers, pl_module.policy):
                responses = generate_responses(
                    pl_module.policy,
                    tokenizer,
                    [prompt.text for prompt in prompts],
                    max_new_tokens=self.max_new_tokens,
                    batch_size=self.batch_size,
                )
            self.on_answers(trainer, name, prompts, responses)
            refused = torch.tensor(float(sum(map(is_refusal, responses))), device=pl_module.device)
            total = refused if together else trainer.strategy.reduce(refused, reduce_op="sum")
            rates[name] = float(total) / len(suite.prompts)
        self.measured[trainer.global_step] = _labelled(rates)
        return rates


def _suite(name: str, spec: str, max_prompts: int) -> Suite:
    kind = _KINDS[name]
    if spec == EMBEDDED:
        return load_suite(f"embedded_{name}", max_prompts)
    if spec in known_suites():
        return load_suite(SuiteOptions(spec, kind=kind), max_prompts)
    return load_suite(SuiteOptions(name, file=spec, kind=kind), max_prompts)


def _labelled(rates: dict[str, float]) -> dict[str, float]:
    return {_LABELS[name]: rate for name, rate in rates.items()}
