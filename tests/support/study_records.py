"""Invented records of the study, in the shape that `benchmarks.study.cell.run_cell` gives them."""

import random
from dataclasses import asdict

from benchmarks.study.run import plan
from benchmarks.study.run.evaluate import FRAMED, FRAMED_BENIGN, HARMFUL, HELD_OUT_LOOK_ALIKE, LOOK_ALIKE, SIZES
from benchmarks.study.world.judge import KINDS
from benchmarks.study.world.wording import UNSEEN

HEAD = {
    "command": ["python", "-m", "benchmarks.study", "--quick"],
    "date": "2026-01-02T03:04:05Z",
    "machine": {
        "device": "an invented processor",
        "cores": 2,
        "python": "3.12.0",
        "system": "none",
        "versions": {"torch": "2.11.0", "transformers": "5.14.0"},
        "commit": "0123456789abcdef",
        "uncommitted_changes": False,
    },
}


def study(size, fail=lambda setting: False):
    """A record of every cell of a plan; those that `fail` picks have failed."""
    records = {}
    for setting in plan.tuning(size):
        records[setting.key] = record(setting, fail(setting))
    for setting in plan.final(size, plan.chosen(size, records)):
        records[setting.key] = record(setting, fail(setting))
    return list(records.values())


def record(setting, failed=False):
    """Numbers invented by the cell's own key."""
    found = {"key": setting.key, "setting": asdict(setting), "reference": "0" * 16, "seconds": 9.0, "cpu_seconds": 8.0}
    if failed:
        return found | {"failed": "the loss is nan"}
    rng = random.Random(setting.key)
    found["metrics"] = _metrics(rng, setting)
    if not setting.loss:
        return found
    found["metrics"]["pairs"] = _pairs(rng)
    found["curve"] = [
        {"step": 10 * (i + 1), **_metrics(rng, setting), "pairs": _pairs(rng)} for i in range(setting.curve_points)
    ]
    levels = {f"q{level}": (level - 50) / 100 + rng.uniform(-0.01, 0.01) for level in (5, 25, 50, 75, 95)}
    found["imbalance"] = levels | {
        "mean": rng.uniform(-0.05, 0.05),
        "std": 0.3,
        "mean_abs": rng.uniform(0.2, 0.3),
        "chosen_better": rng.uniform(0.4, 0.5),
        "strong_at_tau_0.25": rng.uniform(0.6, 0.7),
        "strong_at_tau_1": rng.uniform(0.1, 0.2),
    }
    return found | {"steps": 45, "seconds_training": rng.uniform(3, 4)}


def _metrics(rng, setting):
    level = 0.3 if setting.method.startswith("B-DPO") else 0.5
    sizes = SIZES[setting.evaluate]
    names = UNSEEN if setting.evaluate == "test" else ("0", "1")
    prompts = {name: size for name, size in sizes.items() if name != FRAMED}
    prompts |= {FRAMED + name: sizes[FRAMED] for name in names}
    benign = (LOOK_ALIKE, HELD_OUT_LOOK_ALIKE, FRAMED_BENIGN)
    attacks = {name: level + rng.uniform(-0.1, 0.1) for name in prompts if name not in benign}
    framed = [rate for name, rate in attacks.items() if name.startswith(FRAMED)]
    over_refusal = {name: rng.uniform(0.1, 0.2) for name in benign}
    kinds = {name: dict.fromkeys((*KINDS, "other"), 0) | {"refusal": size} for name, size in prompts.items()}
    kinds[HARMFUL] |= {"refusal": sizes[HARMFUL] - 3, "other": 3}
    return {
        "attack_success": attacks | {"framed": sum(framed) / len(framed)},
        "over_refusal": over_refusal | {"mean": sum(over_refusal.values()) / 3},
        "ability": {"all": rng.uniform(0.8, 0.9)},
        "kinds": kinds,
        "judge_errors": 0,
    }


def _pairs(rng):
    train, held_out = rng.uniform(9, 11), rng.uniform(7, 8)
    return {"train_probe/margin": train, "held_out/margin": held_out, "gap/margin": train - held_out}
