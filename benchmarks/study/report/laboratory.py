"""Facts about how the study was made, for `page.md.j2`: the world, the records, the machine, a cell to run again."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks.study.report.choices import all_trials, error
from benchmarks.study.report.results import Results
from benchmarks.study.run import plan, reference
from benchmarks.study.run.evaluate import FRAMED, evaluation
from benchmarks.study.run.plan import BDPO, DPO
from benchmarks.study.world.texts import acts

_ORDER = [method.name for method in plan.METHODS]


def laboratory(results: Results) -> dict[str, Any]:
    """Gather all facts about how the study was made."""
    trained = next((cell for cell in results.pick("final") if cell["setting"]["loss"]), results.cells[0])
    setting = trained["setting"]
    sizes = reference.SIZES
    return {
        "lacking": lacking(results),
        "failed": _failed(results),
        "world": _world(),
        "reference": {
            "layers": sizes["num_hidden_layers"],
            "width": sizes["hidden_size"],
            "steps": setting["reference_steps"],
        },
        "num_pairs": setting["num_pairs"],
        "measured": _measured(results),
        "trials": _trials(results),
        "testing": _testing(results, setting),
        "machine": _machine(results),
        "again": next((c for c in results.pick("final", BDPO.name) if "metrics" in c), results.cells[0]),
    }


def lacking(results: Results) -> str:
    """Describe in a sentence which cells of `plan.FULL` the records lack; empty if none."""
    wanted = Counter(setting.section for setting in plan.all_cells(plan.FULL))
    there = Counter(cell["setting"]["section"] for cell in results.cells)
    short = [f"{section} {there[section]} of {number}" for section, number in wanted.items() if there[section] < number]
    methods = [name for name in _ORDER if not results.pick("final", name)]
    text = f"Cells in the records: {', '.join(short)}." if short else ""
    return text + (f" Methods without results: {'; '.join(methods)}." if methods else "")


def _failed(results: Results) -> dict[str, Any] | None:
    failed = [cell for cell in results.cells if "failed" in cell]
    if not failed:
        return None
    counted = Counter((cell["setting"]["section"], cell["setting"]["method"]) for cell in failed)
    listed = ", ".join(f"{method} in {section} ({number})" for (section, method), number in counted.items())
    return {"number": len(failed), "of": len(results.cells), "listed": listed}


def _world() -> dict[str, int]:
    every = acts()
    harmful = [act for act in every if act.kind == "harmful"]
    return {
        "acts": len(every),
        "risks": len({act.topic.name for act in harmful}),
        "held_out": len({act.topic.name for act in harmful if act.category_held_out}),
    }


def _measured(results: Results) -> dict[str, Any] | None:
    measured = next((cell for cell in results.pick("final") if "metrics" in cell), None)
    if measured is None:
        return None
    counts = {name: sum(kinds.values()) for name, kinds in measured["metrics"]["kinds"].items()}
    framed = [number for name, number in counts.items() if name.startswith(FRAMED)]
    return {
        "plain": "; ".join(f"{number} {name}" for name, number in counts.items() if not name.startswith(FRAMED)),
        "framings": len(framed),
        "framed": framed[0] if framed else 0,
        "abilities": len(evaluation("test").abilities),
        "errors": sum(cell["metrics"].get("judge_errors", 0) for cell in results.cells if "metrics" in cell),
    }


def _trials(results: Results) -> dict[str, Any] | None:
    counts = {name: len(trials) for name, trials in all_trials(results).items()}
    if not counts:
        return None
    different = set(counts.values())
    return {
        "same": different.pop() if len(different) == 1 else None,
        "each": ", ".join(f"{name} {number}" for name, number in counts.items()),
        "seeds": error(results)[1],
        "tau": plan.TAU,
    }


def _testing(results: Results, setting: dict[str, Any]) -> dict[str, Any] | None:
    seeds = Counter(cell["setting"]["method"] for cell in results.pick("final") if cell["setting"]["loss"])
    if not seeds:
        return None
    return {
        "fewest": min(seeds.values()),
        "most": max(seeds.values()),
        "others": len(results.pick("curves", DPO.name, "")),
        "batch": setting["batch_size"],
    }


def _machine(results: Results) -> dict[str, Any]:
    seconds = sum(cell.get("cpu_seconds", 0.0) for cell in results.cells)
    found: dict[str, Any] = {"command": None, "cells": len(results.cells), "hours": seconds / 3600}
    if not results.heads:
        return found
    heads = [head["machine"] for head in results.heads]
    dates = sorted({head["date"][:10] for head in results.heads})
    versions = heads[0]["versions"]
    return found | {
        "command": " ".join(results.heads[0]["command"]),
        "dates": " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        "device": heads[0]["device"],
        "cores": heads[0]["cores"],
        "python": heads[0]["python"],
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions),
        "commits": ", ".join(dict.fromkeys(str(head["commit"])[:12] for head in heads)),
        "changed": any(head["uncommitted_changes"] for head in heads),
    }
