"""The cells of the study: the same number of trials for every method, then many seeds of the chosen setting."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bdpo_pl.errors import InputError
from benchmarks.study.run.evaluate import validation_score
from benchmarks.study.run.settings import Pairs, Section, Setting


@dataclass(frozen=True)
class Method:
    """A method of alignment.

    Attributes:
        name: name in tables.
        loss: class in `bdpo_pl.losses`.
        betas: values of β to try: its authors' own first, then others around it.
        arguments: arguments of the loss besides β.
    """

    name: str
    loss: str
    betas: tuple[float, ...]
    arguments: tuple[tuple[str, Any], ...] = ()

    def setting(self, section: Section, beta: float, **fields: Any) -> Setting:
        """Return a cell of this method."""
        return Setting(section, self.name, self.loss, {"beta": beta, **dict(self.arguments)}, **fields)


_DPO_BETAS = (0.1, 0.03, 0.5, 1.5, 0.01)
# The standard deviation of the imbalance in this world, whose prompts carry about six nats and whose responses have
# about twenty tokens.
TAU = 0.25
_BALANCED = "BalancedDPOLoss"

DPO = Method("DPO", "DPOLoss", _DPO_BETAS)
BDPO = Method("B-DPO", _BALANCED, _DPO_BETAS, (("tau", TAU),))
DPO_BW = Method("DPO+BW", _BALANCED, _DPO_BETAS, (("tau", TAU), ("scale", 1.0)))
DPO_SF = Method("DPO+SF", _BALANCED, _DPO_BETAS, (("balance", False), ("scale", 2.0)))

METHODS = (
    DPO,
    Method("IPO", "IPOLoss", (0.1, 0.3, 1.0, 3.0, 0.03)),
    Method("CPO", "CPOLoss", _DPO_BETAS),
    Method("SimPO", "SimPOLoss", (2.5, 1.0, 6.0, 15.0, 0.4)),
    Method("SafeDPO", "SafeDPOLoss", _DPO_BETAS),
    Method("RMiPO", "RMiPOLoss", (2.0, 0.8, 5.0, 12.0, 0.3)),
    DPO_BW,
    DPO_SF,
    BDPO,
    Method("B-DPO, s by norm", _BALANCED, _DPO_BETAS, (("tau", TAU), ("scale", "norm"))),
)

BDPO_AUTO = Method("B-DPO, τ auto", _BALANCED, _DPO_BETAS, (("tau", "auto"),))
"""What `BalancedDPOLoss` did by default for a while; the whole study was made before τ could be `auto`."""

LEARNING_RATES = (3e-5, 6e-5, 1.2e-4, 2.4e-4)
EPOCHS = (1, 2)
# Not a seed of any other section: nothing is chosen on the data on which it is then tested.
TUNING_SEEDS = (1000, 1001)
HALVES: tuple[Pairs, ...] = ("balanced half", "imbalanced half", "random half")
CURVE_EPOCHS, CURVE_POINTS = 4, 8
ALIKE = "settings as B-DPO's"
"""Variant of DPO in the curves: it differs from B-DPO only in balance."""
NO_BALANCE = "no balance: DPO"
DPO_ALIKE = f"{DPO.name}, {ALIKE}"
CONFIRMED = (DPO.name, DPO_ALIKE, BDPO.name, f"{BDPO.name}, τ 1")
"""Methods that the confirmation compares."""
CONFIRMATION_SEED = 100
"""First seed of the confirmation: no other section has seen its pairs."""

# Name → (arguments of the loss, fields of the setting) that replace B-DPO's chosen ones.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    NO_BALANCE: ({"balance": False, "scale": 1.0}, {}),
    "τ 0.06": ({"tau": 0.06}, {}),
    "τ 0.12": ({"tau": 0.12}, {}),
    "τ 0.5": ({"tau": 0.5}, {}),
    "τ 1": ({"tau": 1.0}, {}),
    "β × 1/3": ({"beta": 1 / 3}, {}),
    "β × 3": ({"beta": 3.0}, {}),
    "scale 1": ({"scale": 1.0}, {}),
    "scale norm": ({"scale": "norm"}, {}),
    "estimator pmi_sum, τ 5": ({"estimator": "pmi_sum", "tau": 5.0}, {}),
    "estimator ifd, τ 1": ({"estimator": "ifd", "tau": 1.0}, {}),
    "estimator ifd, ratio": ({"estimator": "ifd", "weighting": "ratio"}, {}),
    "estimator hsic, ratio": ({"estimator": "hsic", "weighting": "ratio"}, {}),
    "null prompt: Hello.": ({}, {"null_prompt": "Hello."}),
    "null prompt: Tell me something.": ({}, {"null_prompt": "Tell me something."}),
    "comprehension every 10 steps": ({}, {"reestimate_every": 10}),
}
# What came after the whole study, and is asked in its quick form only.
LATER_VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "τ auto": ({"tau": "auto"}, {}),
    "τ auto, weights at most 4 : 1": ({"tau": "auto", "max_weight_ratio": 4.0}, {}),
}


@dataclass(frozen=True)
class Size:
    """The size of the study.

    Attributes:
        methods: compared methods.
        seeds: number of seeds of the final cells and of the halves.
        few_seeds: number of seeds of the curves and of the sensitivity.
        learning_rates: learning rates tried in tuning.
        epochs: numbers of epochs tried in tuning.
        betas: number of values of β tried in tuning, the first of each method's.
        tuning_seeds: number of seeds of each trial.
        variants: variants in the sensitivity section.
        curve_methods: methods for which curves are drawn.
        replication: whether to train another reference and repeat the ablation with it.
        confirmation: references of the confirmation, and the number of seeds of each.
        common: fields of every setting.
    """

    methods: tuple[Method, ...] = METHODS
    seeds: int = 10
    few_seeds: int = 5
    learning_rates: tuple[float, ...] = LEARNING_RATES
    epochs: tuple[int, ...] = EPOCHS
    betas: int = 5
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    variants: tuple[str, ...] = tuple(VARIANTS)
    curve_methods: tuple[Method, ...] = (DPO, BDPO)
    replication: bool = True
    confirmation: tuple[tuple[int, int], ...] = ((0, 20), (2, 10), (3, 10))
    common: tuple[tuple[str, Any], ...] = ()


FULL = Size()
QUICK = Size(
    methods=(DPO, DPO_BW, DPO_SF, BDPO, BDPO_AUTO),
    seeds=3,
    few_seeds=3,
    learning_rates=LEARNING_RATES[1:2],
    epochs=EPOCHS[:1],
    betas=2,
    tuning_seeds=TUNING_SEEDS[:1],
    variants=(NO_BALANCE, "τ 1", *LATER_VARIANTS),
    replication=False,
    confirmation=(),
    common=(("reference_steps", 600), ("num_pairs", 360)),
)


def tuning(size: Size) -> list[Setting]:
    """Return every method on its grid, evaluated on the validation prompts."""
    return [
        method.setting(
            "tuning",
            beta,
            learning_rate=rate,
            epochs=epochs,
            seed=seed,
            evaluate="validation",
            **dict(size.common),
        )
        for method in size.methods
        for beta, rate, epochs in itertools.product(method.betas[: size.betas], size.learning_rates, size.epochs)
        for seed in size.tuning_seeds
    ]


def chosen(size: Size, records: Mapping[str, dict[str, Any]]) -> dict[str, Setting]:
    """Return each method's trial with the smallest mean validation score; of equal ones the first in the grid.

    A trial that has failed with any seed is not chosen.

    Args:
        size: size of the study whose tuning this was.
        records: finished cells by key.

    Raises:
        InputError: every trial of a method has failed.
    """
    cells = tuning(size)
    best: dict[str, tuple[float, Setting]] = {}
    seeds = len(size.tuning_seeds)
    for trial in (cells[i : i + seeds] for i in range(0, len(cells), seeds)):
        found = [records[setting.key] for setting in trial]
        if any("failed" in record for record in found):
            continue
        score = sum(validation_score(record["metrics"]) for record in found) / seeds
        method = trial[0].method
        if method not in best or score < best[method][0]:
            best[method] = score, trial[0]
    if missing := [method.name for method in size.methods if method.name not in best]:
        raise InputError(f"no trial of {', '.join(missing)} has ended with finite numbers; widen its grid in plan.py")
    return {name: setting for name, (_, setting) in best.items()}


def final(size: Size, best: Mapping[str, Setting]) -> list[Setting]:
    """Return all cells after the tuning, on the test prompts.

    Args:
        size: size of the study.
        best: chosen setting by method.
    """
    common = dict(size.common)
    cells = [Setting("final", "reference", "", **common)]
    cells += _seeds([best[method.name] for method in size.methods], size.seeds, section="final")
    dpo, bdpo = best[DPO.name], best[BDPO.name]
    for half in HALVES:
        cells += _seeds([dpo], size.seeds, section="imbalance", variant=half, pairs=half)
    cells += _seeds(
        [*(best[method.name] for method in size.curve_methods), _alike(bdpo).with_changes(variant=ALIKE)],
        size.few_seeds,
        section="curves",
        epochs=CURVE_EPOCHS,
        curve_points=CURVE_POINTS,
    )
    for name in size.variants:
        arguments, fields = (VARIANTS | LATER_VARIANTS)[name]
        changed = bdpo.arguments | arguments
        if "beta" in arguments:
            changed["beta"] = bdpo.arguments["beta"] * arguments["beta"]
        cells += _seeds([bdpo], size.few_seeds, section="sensitivity", variant=name, arguments=changed, **fields)
    if size.replication:
        cells.append(Setting("replication", "reference", "", **common, world=1))
        ablation = [best[method.name] for method in (DPO, DPO_BW, DPO_SF, BDPO)]
        cells += _seeds(ablation, size.few_seeds, section="replication", world=1)
    return cells + _confirmation(size, dpo, bdpo)


def all_cells(size: Size) -> list[Setting]:
    """Return every cell before tuning has chosen; the later cells use the last trial of each method."""
    cells = tuning(size)
    return cells + final(size, {setting.method: setting for setting in cells})


def _alike(bdpo: Setting) -> Setting:
    """Return DPO with B-DPO's β, learning rate and epochs."""
    return bdpo.with_changes(method=DPO.name, loss=DPO.loss, arguments={"beta": bdpo.arguments["beta"]})


def _confirmation(size: Size, dpo: Setting, bdpo: Setting) -> list[Setting]:
    settings = (dpo, _alike(bdpo), bdpo, bdpo.with_changes(arguments=bdpo.arguments | {"tau": 1.0}))
    named = [setting.with_changes(method=name) for name, setting in zip(CONFIRMED, settings, strict=True)]
    return [
        cell
        for world, seeds in size.confirmation
        for cell in _seeds(
            named,
            seeds,
            first=CONFIRMATION_SEED,
            section="confirmation",
            variant=world_name(world),
            world=world,
        )
    ]


def world_name(world: int) -> str:
    """Return the name of a reference in tables."""
    return f"reference {world + 1}"


def _seeds(settings: Sequence[Setting], number: int, first: int = 0, **changes: Any) -> list[Setting]:
    return [
        setting.with_changes(evaluate="test", seed=seed, **changes)
        for setting in settings
        for seed in range(first, first + number)
    ]
