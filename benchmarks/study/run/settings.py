"""One run of the study, said in full: everything that its numbers depend on, and nothing else."""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from benchmarks.study.run.reference import STEPS

Pairs = Literal["all", "balanced half", "imbalanced half", "random half"]
Section = Literal["tuning", "final", "imbalance", "curves", "sensitivity", "replication", "confirmation"]


@dataclass(frozen=True)
class Setting:
    """What a cell does.

    Attributes:
        section: part of the study that it belongs to.
        method: name in tables.
        loss: class in `bdpo_pl.losses`; empty: no training, the reference itself.
        arguments: of the loss.
        learning_rate: peak of a cosine schedule with a warm-up.
        epochs: over the pairs.
        seed: draws the pairs and the order of training.
        evaluate: whose prompts are answered.
        variant: what is varied, in the sections that vary one thing.
        pairs: which of the drawn pairs are trained on.
        num_pairs: drawn.
        batch_size: pairs in an optimiser step.
        null_prompt: the user's words in the null prompt of comprehension.
        reestimate_every: optimiser steps between two measurements of comprehension on the policy; None: never.
        curve_points: evaluations on the way, evenly spaced, the last one at the end; 0: only at the end.
        world: number of the reference.
        reference_steps: of its supervised training.
    """

    section: Section
    method: str
    loss: str
    arguments: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 3e-4
    epochs: int = 1
    seed: int = 0
    evaluate: Literal["validation", "test"] = "test"
    variant: str = ""
    pairs: Pairs = "all"
    num_pairs: int = 720
    batch_size: int = 16
    null_prompt: str = ""
    reestimate_every: int | None = None
    curve_points: int = 0
    world: int = 0
    reference_steps: int = STEPS

    @property
    def key(self) -> str:
        """A digest of all of it, which names the cell."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def trial(self) -> tuple[str, float, int]:
        """What tuning chooses: arguments of the loss, learning rate, epochs."""
        return json.dumps(self.arguments, sort_keys=True), self.learning_rate, self.epochs

    def with_changes(self, **changes: Any) -> Setting:
        """The same with some fields changed."""
        return replace(self, **changes)

    def build_loss(self) -> Any:
        """The loss, imported only now."""
        return getattr(importlib.import_module("bdpo_pl.losses"), self.loss)(**self.arguments)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Setting:
        """The setting that `asdict` made `fields` of."""
        return cls(**fields)
