"""The cells of the study with a real model: equal trials for every method, then several seeds of the chosen ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from benchmarks.study.run.records import key_of

Section = Literal["reference", "tuning", "final", "halves", "confirmation"]

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPO": ("DPOLoss", {}),
    "B-DPO": ("BalancedDPOLoss", {"tau": "auto"}),
    "B-DPO, τ 0.25": ("BalancedDPOLoss", {"tau": 0.25}),
    "DPO+SF": ("BalancedDPOLoss", {"balance": False, "scale": 2.0}),
    "AdaDPO": ("AdaDPOLoss", {}),
    "RPO": ("DPOLoss", {"sft_weight": 1.0}),
}
"""Name in tables → class in `bdpo_pl.losses`, and its arguments besides β."""

BETAS = (0.1, 0.3)
LEARNING_RATES = (5e-6, 2e-5)
CONFIRMED = ("DPO", "B-DPO")
HALVES = ("balanced", "imbalanced")
HALF_PAIRS = 128
TUNING_SEED = 1000
SEEDS = (0, 1, 2, 3, 4)
REFERENCE = "before training"


@dataclass(frozen=True)
class Cell:
    """What a cell depends on, besides model, pairs and prompts.

    Attributes:
        section: section of the study.
        method: name in tables.
        loss: class in `bdpo_pl.losses`; empty: no training.
        arguments: arguments of the loss.
        learning_rate: peak of the schedule.
        seed: seed of the drawn pairs and of the order of training.
        num_pairs: number of training pairs; one epoch over them.
        batch_size: pairs in an optimiser step.
    """

    section: Section
    method: str
    loss: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 0.0
    seed: int = 0
    num_pairs: int = 256
    batch_size: int = 8

    @property
    def key(self) -> str:
        """Digest of all fields, which identifies the cell."""
        return key_of(self)

    @property
    def asks_prompts(self) -> bool:
        """True if the prompts are asked too, not only pairs scored."""
        return self.section in ("reference", "final")

    @property
    def held_out(self) -> str:
        """Name of the held-out pairs that it is measured on: nothing is chosen on those that it is then tested on."""
        return "validation" if self.section == "tuning" else "test"


@dataclass(frozen=True)
class HalfCell(Cell):
    """A cell that is trained on pairs of one half (`benchmarks.study.real.halves`).

    Attributes:
        half: `balanced` or `imbalanced`.
    """

    half: str = "balanced"


def cell_of(fields: Mapping[str, Any]) -> Cell:
    """Return the cell with these fields, as a record has them."""
    return HalfCell(**fields) if "half" in fields else Cell(**fields)


def reference() -> Cell:
    """Return the cell that measures the model before training."""
    return Cell("reference", REFERENCE)


def tuning() -> list[Cell]:
    """Return the trials: for every method each β with each learning rate, on one seed."""
    return [
        Cell("tuning", method, loss, {"beta": beta, **arguments}, rate, TUNING_SEED)
        for method, (loss, arguments) in METHODS.items()
        for beta in BETAS
        for rate in LEARNING_RATES
    ]


def chosen(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Cell]:
    """Choose each method's trial by the validation pairs.

    The trial with the highest `logp_accuracy` is chosen; of equals the one whose chosen responses drift least.

    Args:
        records: finished cells by key.

    Returns:
        Chosen trial by method, for the methods whose trials are all finished.
    """
    best = {}
    for method in METHODS:
        trials = [cell for cell in tuning() if cell.method == method]
        if all(cell.key in records for cell in trials):

            def score(cell: Cell) -> tuple[float, float]:
                measured = records[cell.key]["pairs"]
                return measured["held_out/logp_accuracy"], -abs(measured["held_out/drift_chosen"])

            best[method] = max(trials, key=score)
    return best


def final(best: Mapping[str, Cell]) -> list[Cell]:
    """Return the cells that are tested: all seeds of each chosen trial, seed by seed, so that any stop leaves pairs."""
    return [replace(cell, section="final", seed=seed) for seed in SEEDS for cell in best.values()]


def halves(best: Mapping[str, Cell]) -> list[Cell]:
    """Return the cells of observation (b): DPO as it was chosen, on both halves with every seed."""
    if "DPO" not in best:
        return []
    fields = asdict(best["DPO"]) | {"section": "halves", "num_pairs": HALF_PAIRS}
    return [HalfCell(**{**fields, "seed": seed}, half=half) for seed in SEEDS for half in HALVES]


def confirmation(best: Mapping[str, Cell]) -> list[Cell]:
    """Return the cells on a second model: DPO and B-DPO as they were chosen on the first, seed by seed, no prompts."""
    return [replace(best[method], section="confirmation", seed=seed) for seed in SEEDS for method in CONFIRMED]


def all_cells(records: Mapping[str, Mapping[str, Any]]) -> Sequence[Cell]:
    """Return every cell that is known so far, in the order in which they are run."""
    best = chosen(records)
    # The halves come last: what was registered first is finished first.
    return [reference(), *tuning(), *final(best), *(halves(best) if len(best) == len(METHODS) else [])]
