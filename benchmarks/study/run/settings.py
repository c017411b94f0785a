"""One run of the study, described in full: everything on which its numbers depend, and nothing else."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from benchmarks.study.run.records import key_of
from benchmarks.study.run.reference import STEPS

Pairs = Literal["all", "balanced half", "imbalanced half", "random half"]
Section = Literal["tuning", "final", "imbalance", "curves", "sensitivity", "replication", "confirmation"]


@dataclass(frozen=True)
class Setting:
    """The setting of a cell.

    Attributes:
        section: section of the study to which it belongs.
        method: name of the method in tables.
        loss: class in `bdpo_pl.losses`; empty: no training, the reference itself.
        arguments: arguments of the loss.
        learning_rate: peak of a cosine schedule with a warm-up.
        epochs: number of epochs over the pairs.
        seed: seed of the pairs and of the order of training.
        evaluate: split whose prompts are answered.
        variant: name of what is varied, in the sections that vary one thing.
        pairs: selection of the drawn pairs that are trained on.
        num_pairs: number of pairs drawn.
        batch_size: number of pairs in an optimiser step.
        null_prompt: the user's words in the null prompt of comprehension.
        reestimate_every: number of optimiser steps between two measurements of comprehension on the policy; None:
            never.
        curve_points: number of evaluations during training, evenly spaced, the last at the end; 0: only at the end.
        world: number of the reference.
        reference_steps: number of steps of its supervised training.
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
        """Digest of all fields, which identifies the cell."""
        return key_of(self)

    @property
    def trial(self) -> tuple[str, float, int]:
        """Values that tuning chooses: arguments of the loss, learning rate, epochs."""
        return json.dumps(self.arguments, sort_keys=True), self.learning_rate, self.epochs

    def with_changes(self, **changes: Any) -> Setting:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def build_loss(self) -> Any:
        """Build the loss, which is imported only here."""
        return getattr(importlib.import_module("bdpo_pl.losses"), self.loss)(**self.arguments)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Setting:
        """Restore the setting from the `fields` that `asdict` returned."""
        return cls(**fields)
