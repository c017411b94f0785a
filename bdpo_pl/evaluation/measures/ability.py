"""General ability, which alignment must not reduce: a small built-in check, and lm-evaluation-harness.

The built-in check is for the embedded model, which was taught to answer everyday questions in a few forms. For a real
model, choose tasks of lm-evaluation-harness (extra `eval`), such as GSM8K. SimpleQA, StrongREJECT and XSTest with their
own LLM judges are in inspect-evals, which reads the folder that `fit` exports (see docs/evaluation.md).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bdpo_pl import embedded
from bdpo_pl.data.loading import load_pairs
from bdpo_pl.data.sources import read_records
from bdpo_pl.data.tokenization import PairTokenizer, padding_id
from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.embedded.make.responses import HELPFUL
from bdpo_pl.errors import InputError, is_given, require_at_least
from bdpo_pl.forward.generation import generate_responses
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.scoring.scoring_pass import score_pairs
from bdpo_pl.statistics import Interval, mean, normal, wilson

# A helpful answer is one of the forms that the model was taught, in full.
_HELPFUL = re.compile("|".join(re.sub(r"\\\{\w+\\\}", ".+", re.escape(form)) for form in HELPFUL))
_WINDOW = 512
_LM_EVAL = "lm_eval "
_RESAMPLES = 1000
# Metrics of lm-evaluation-harness that are means of answers that are right (1) or wrong (0). A value between 0 and 1 is
# no sign of a share: so are many bits per byte.
_SHARES = frozenset(
    (
        "acc", "acc_all", "acc_bytes", "acc_mutual_info", "acc_norm", "accuracy", "exact_match",
        "inst_level_loose_acc", "inst_level_strict_acc", "pass@1", "pass_at_1", "prompt_level_loose_acc",
        "prompt_level_strict_acc",
    )
)  # fmt: skip


@dataclass
class AbilityOptions:
    """Measures of general ability.

    Args:
        embedded: test everyday questions that the embedded model was taught to answer; meaningless for other models.
        lm_eval: tasks of lm-evaluation-harness, as a list or `a,b`; needs `pip install "bdpo-pl[eval]"`.
        include_path: folder with task files of your own for lm-evaluation-harness.
        limit: maximum number of examples of each task.
        num_fewshot: number of worked examples in each prompt. Default: the task's own.
        batch_size: number of examples processed at a time.

    Raises:
        InputError: a number is out of range, or an option of lm-evaluation-harness is given without `lm_eval`.
    """

    embedded: bool = False
    lm_eval: list[str] | str = field(default_factory=list)
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.lm_eval, str):
            self.lm_eval = self.lm_eval.split(",")
        require_at_least("ability", self, limit=1, num_fewshot=0, batch_size=1)
        for name in ("include_path", "limit", "num_fewshot", "batch_size"):
            if not self.lm_eval and is_given(self, name):
                raise InputError(f"ability.{name} is for tasks of lm_eval, and there are none: give ability.lm_eval")


@dataclass(frozen=True)
class Ability:
    """One measure of a model's general ability.

    Attributes:
        name: name of the task and metric.
        value: value with its interval. With lm-evaluation-harness, that of a share is Wilson's, for as many examples as
            its standard error stands for; that of another number is ± 1.96 standard errors. There is none if the
            harness gives no error, or if the error of another number is 0.
        percent: true if the value is a share, to be shown in per cent.
        higher_is_better: true if a higher value is better; None if it is not known.
    """

    name: str
    value: Interval
    percent: bool = True
    higher_is_better: bool | None = True


def measure_ability(options: AbilityOptions, model: CausalLM, tokenizer: TokenizerLike) -> list[Ability]:
    """Compute all measures that `options` enables.

    Raises:
        InputError: lm-evaluation-harness is not installed, or has no such task.
    """
    found = _embedded(model, tokenizer) if options.embedded else []
    return found + (_lm_eval(options, model, tokenizer) if options.lm_eval else [])


def check(options: AbilityOptions) -> None:
    """Raise `InputError` for errors that can be found before any model is loaded."""
    if options.lm_eval:
        _tasks(options)


def _embedded(model: CausalLM, tokenizer: TokenizerLike) -> list[Ability]:
    rows = [record.fields for record in read_records(str(embedded.HELD_OUT_FILE))]
    prompts = [row["prompt"] for row in rows if row["kind"] == "benign"]
    answers = generate_responses(model, tokenizer, prompts, max_new_tokens=48, batch_size=len(prompts))
    helped = [float(_HELPFUL.fullmatch(answer) is not None) for answer in answers]
    table, _ = load_pairs("held_out", str(embedded.HELD_OUT_FILE), PairTokenizer(tokenizer), Truncation(_WINDOW))
    benign = [i for i, row in enumerate(rows) if row["kind"] != "harmful"]
    scores = score_pairs(model, table, benign, comprehension=False, pad_id=padding_id(tokenizer))
    per_token = scores.reference[0].astype(np.float64) / table.trained_lengths[0, benign]
    return [
        Ability("everyday questions answered helpfully", mean(helped)),
        Ability("log-probability of helpful answers, nats per token", mean(per_token, rate=False), percent=False),
    ]


def _lm_eval(options: AbilityOptions, model: CausalLM, tokenizer: TokenizerLike) -> list[Ability]:
    lm_eval, manager = _tasks(options)
    from lm_eval.models.huggingface import HFLM

    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size),
        tasks=options.lm_eval,
        task_manager=manager,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        # Not 0: errors of means have a closed form, but 0 would omit those too.
        bootstrap_iters=_RESAMPLES,
        log_samples=False,
    )
    found = []
    for task, metrics in results["results"].items():
        higher = results.get("higher_is_better", {}).get(task, {})
        count = int(results["n-samples"][task]["effective"]) if task in results.get("n-samples", {}) else 0
        for key, value in metrics.items():
            metric, _, kept = key.partition(",")
            if not isinstance(value, (int, float)) or metric.endswith("_stderr") or not kept:
                continue
            error = metrics.get(f"{metric}_stderr,{kept}")
            error = error if isinstance(error, (int, float)) else float("nan")
            name = f"{_LM_EVAL}{task}, {metric}" + (f" ({kept})" if kept != "none" else "")
            share = metric in _SHARES and 0 <= value <= 1
            interval = (_share if share else _number)(float(value), float(error), count)
            found.append(Ability(name, interval, percent=share, higher_is_better=higher.get(metric)))
    return found


def _share(value: float, error: float, count: int) -> Interval:
    """Return a share with Wilson's interval; an error of 0 means that all of `count` answers were right, or wrong."""
    examples = value * (1 - value) / error**2 if error else count
    if not examples > 0:
        return Interval(value, math.nan, math.nan, count, count)
    return Interval(value, *wilson(value * examples, examples), count, count)


def _number(value: float, error: float, count: int) -> Interval:
    """Return a number ± 1.96 standard errors; examples that are all alike do not make it certain."""
    return normal(value, error or math.nan, count)


_MANAGERS: dict[str | None, Any] = {}


def _tasks(options: AbilityOptions) -> tuple[Any, Any]:
    """Return (lm_eval, its index of tasks), after checking that it has every requested task."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f'ability.lm_eval needs lm-evaluation-harness ({error}): pip install "bdpo-pl[eval]", or leave it out'
        ) from error
    path = options.include_path
    if path is not None and not Path(path).expanduser().is_dir():
        raise InputError(f"ability.include_path: no folder {path} (looked from {Path.cwd()})")
    # Cached, because the index reads thousands of files, which takes seconds.
    manager = _MANAGERS.get(path) or TaskManager(include_path=path and str(Path(path).expanduser()))
    _MANAGERS[path] = manager
    unknown = [task for task in options.lm_eval if not manager.match_tasks([task])]
    if unknown:
        raise InputError(
            f"ability.lm_eval: lm-evaluation-harness has no task {', '.join(unknown)}; `lm-eval ls tasks` lists them, "
            "and ability.include_path takes yours"
        )
    return lm_eval, manager
