"""Ranges of all numeric options in one table, checked when the options are parsed instead of hours later."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bdpo_pl.errors import InputError

_WHOLE = re.compile(r"[+-]?[0-9]+")
_MOST = 2**31 - 1
"""Largest count or size: that of 32-bit integers, on which kernels and libraries rely."""


@dataclass(frozen=True)
class Range:
    """A range of numbers for an option; both ends are included unless they are open.

    Attributes:
        low: Lower end.
        high: Upper end.
        open_low: True if `low` itself is excluded.
        open_high: True if `high` itself is excluded.
        share: True for a fraction, which has this range, or a whole number, which counts items and is at least `least`.
        least: Smallest whole number, if `share`.
    """

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    share: bool = False
    least: int = 0

    def holds(self, value: float) -> bool:
        """Return true if `value` is in the range; NaN and infinities are in none."""
        if isinstance(value, int):
            if self.share:
                return self.least <= value <= _MOST
        elif not math.isfinite(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low}" if self.open_low else f"at least {self.low}"
        if self.share:
            return f"a share {low} and at most {self.high}, or a whole number of at least {self.least}"
        if self.high in (math.inf, _MOST):
            return f"{low}, and finite" if self.high == math.inf else low
        return f"{low} and {'below' if self.open_high else 'at most'} {self.high}"


COUNT = Range(1, _MOST)
SOME = Range(0, _MOST)
MINUS_ONE = Range(-1, _MOST)
SEED = Range(0, 2**32 - 1)
POSITIVE = Range(0, open_low=True)
NOT_NEGATIVE = Range(0)
BELOW_ONE = Range(0, 1, open_high=True)
SHARE = Range(0, 1, share=True)

_ENDPOINT = {
    "max_tokens": COUNT, "temperature": NOT_NEGATIVE, "timeout": POSITIVE, "deadline": POSITIVE,
    "max_bytes": COUNT, "retries": SOME, "parallel": Range(1, 1024),
}  # fmt: skip

RANGES: dict[str, Range] = {
    "seed_everything": SEED,
    # The Trainer.
    "trainer.devices": Range(-1, 1024), "trainer.num_nodes": COUNT, "trainer.fast_dev_run": SOME,
    "trainer.max_epochs": MINUS_ONE, "trainer.min_epochs": SOME, "trainer.max_steps": MINUS_ONE,
    "trainer.min_steps": SOME, "trainer.limit_train_batches": SHARE, "trainer.limit_val_batches": SHARE,
    "trainer.limit_test_batches": SHARE, "trainer.limit_predict_batches": SHARE, "trainer.overfit_batches": SHARE,
    "trainer.val_check_interval": Range(0, 1, open_low=True, share=True, least=1),
    "trainer.check_val_every_n_epoch": COUNT, "trainer.num_sanity_val_steps": MINUS_ONE,
    "trainer.log_every_n_steps": SOME, "trainer.accumulate_grad_batches": COUNT,
    "trainer.gradient_clip_val": NOT_NEGATIVE, "trainer.reload_dataloaders_every_n_epochs": SOME,
    # The module.
    "model.reestimate_every": COUNT, "model.warmup_ratio": BELOW_ONE, "model.router_aux_loss": NOT_NEGATIVE,
    "model.scoring.batch_tokens": COUNT, "model.scoring.chunk_pairs": COUNT,
    "model.reference_sync.every": COUNT, "model.reference_sync.mixup": Range(0, 1, open_low=True),
    "model.lora.r": COUNT, "model.lora.alpha": COUNT, "model.lora.dropout": BELOW_ONE,
    "model.lora.lr_ratio": POSITIVE,
    # Of any optimiser or loss that has an option of this name.
    "model.optimizer.lr": NOT_NEGATIVE, "model.optimizer.weight_decay": NOT_NEGATIVE,
    "model.optimizer.eps": NOT_NEGATIVE, "model.optimizer.betas": BELOW_ONE, "model.optimizer.momentum": NOT_NEGATIVE,
    "model.optimizer.clip_threshold": POSITIVE,
    "model.loss.beta": POSITIVE, "model.loss.tau": POSITIVE,
    "model.loss.max_weight_ratio": Range(1, open_low=True),
    # The data.
    "data.held_out_fraction": BELOW_ONE, "data.max_length": Range(2, _MOST), "data.max_prompt_length": COUNT,
    "data.batch_size": COUNT, "data.eval_batch_size": COUNT, "data.max_tokens_per_batch": COUNT,
    "data.num_workers": Range(0, 1024), "data.seed": SEED,
    "data.held_out.limit": COUNT, "data.held_out.weight": Range(0, 1, open_low=True),
    "data.load.safe_rlhf.num_safe": SOME, "data.load.safe_rlhf.num_unsafe": SOME,
    # What is written, measured and stopped at.
    "stop_at_gap": POSITIVE,
    "checkpoint.save_top_k": MINUS_ONE, "checkpoint.every_n_train_steps": SOME, "checkpoint.every_n_epochs": SOME,
    "safety.max_new_tokens": COUNT, "safety.max_prompts": COUNT, "safety.batch_size": COUNT,
    "safety.every_n_steps": COUNT, "completions.num_prompts": SOME, "completions.max_new_tokens": COUNT,
    "diagnose.strong_ratio": Range(1, open_low=True), "diagnose.extremes": SOME,
    # `evaluate`.
    "max_prompts": COUNT, "devices": Range(1, 1024), "generation.max_new_tokens": COUNT, "generation.batch_size": COUNT,
    "generation.max_thought_tokens": SOME,
    **{f"server.{name}": allowed for name, allowed in _ENDPOINT.items() if name != "max_tokens"},
    "judge.batch_size": COUNT, "judge.max_new_tokens": COUNT, "judge.max_length": COUNT, "judge.attempts": COUNT,
    "judge.unsafe_from": Range(0, 1, open_low=True), "judge.threshold": Range(0, 1, open_low=True),
    **{f"judge.endpoint.{name}": allowed for name, allowed in _ENDPOINT.items()},
    **{f"attacks.attacker.{name}": allowed for name, allowed in _ENDPOINT.items()},
    **{f"attacks.translator.{name}": allowed for name, allowed in _ENDPOINT.items()},
    "attacks.max_prompts": COUNT, "budget.requests": COUNT, "budget.minutes": POSITIVE,
    "attacks.gcg.steps": COUNT, "attacks.gcg.search_width": COUNT, "attacks.gcg.topk": COUNT,
    "attacks.gcg.batch_size": COUNT, "attacks.gcg.stop_loss": NOT_NEGATIVE, "attacks.gcg.seed": SEED,
    "attacks.gcg.save_every": COUNT,
    "attacks.refinement.streams": COUNT, "attacks.refinement.steps": COUNT, "attacks.refinement.history": COUNT,
    "attacks.refinement.retries": SOME,
    "attacks.tree.width": COUNT, "attacks.tree.branching": COUNT, "attacks.tree.depth": COUNT,
    "attacks.tree.history": COUNT, "attacks.tree.retries": SOME,
    "attacks.genetic.population": Range(2), "attacks.genetic.generations": COUNT, "attacks.genetic.elite": COUNT,
    "attacks.genetic.crossover": Range(0, 1), "attacks.genetic.mutation": Range(0, 1),
    "attacks.genetic.batch_size": COUNT, "attacks.genetic.seed": SEED,
    "pairs.load.safe_rlhf.num_safe": SOME, "pairs.load.safe_rlhf.num_unsafe": SOME,
    "pairs.max_pairs": SOME, "pairs.max_length": Range(2, _MOST), "pairs.seed": SEED,
    "ability.limit": COUNT, "ability.num_fewshot": SOME, "ability.batch_size": COUNT,
}  # fmt: skip
"""Range of each option, by its name on the command line without `init_args`."""


def check_ranges(options: object) -> None:
    """Check every number among `options` that has a range.

    Args:
        options: Nested mappings, namespaces or dataclasses, as returned by a parser.

    Raises:
        InputError: A number is out of its range; the message names option, value and range.
    """
    for name, value in numbers(options):
        allowed = RANGES.get(name)
        if allowed is not None and not allowed.holds(value):
            shown = str(value)
            raise InputError(f"--{name} must be {allowed}; got {shown[:24]}{'…' if len(shown) > 24 else ''}")


def numbers(options: object, prefix: str = "") -> Iterator[tuple[str, int | float]]:
    """Yield every number among `options` with its option's name; items of a list have the list's name.

    An option that takes a name or a number (`trainer.devices`) comes as a text: one of digits is a number too.
    """
    if isinstance(options, bool) or options is None:
        return
    if isinstance(options, str):
        if prefix in RANGES and _WHOLE.fullmatch(options):
            yield prefix, int(options) if len(options) < 20 else float(options)
        return
    if isinstance(options, int | float):
        yield prefix, options
    elif isinstance(options, list | tuple):
        for item in options:
            yield from numbers(item, prefix)
    else:
        if dataclasses.is_dataclass(options) and not isinstance(options, type):
            options = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        if not isinstance(options, Mapping):
            # A namespace; other objects contain no numeric options.
            options = vars(options) if type(options).__name__ == "Namespace" else {}
        for name, value in options.items():
            if name in ("init_args", "dict_kwargs"):
                yield from numbers(value, prefix)
            else:
                yield from numbers(value, f"{prefix}.{name}" if prefix else str(name))
