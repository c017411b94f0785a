"""The HTML report of a run: its results, its curves, its settings and its environment."""

from __future__ import annotations

import csv
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning
import torch
import transformers

from bdpo_pl import __version__
from bdpo_pl.data.held_out import HELD_OUT
from bdpo_pl.reporting import Finding, Line, Page, Section, Table, line_chart
from bdpo_pl.reporting.format import plural
from bdpo_pl.training.completions_file import Row
from bdpo_pl.training.completions_section import add_completions
from bdpo_pl.training.single_words import worded

_CURVES: tuple[tuple[str, str, tuple[tuple[str, str], ...], str], ...] = (
    (
        "Loss",
        "mean loss of a pair",
        (("training batches", "train/loss"), ("training pairs", "train_probe/loss"),
         ("held-out pairs", "held_out/loss")),
        "Training batches: means since the previous point. The others are measured at validations.",
    ),
    (
        "Margin and its gap",
        "implicit reward, chosen − rejected",
        (("training pairs", "train_probe/margin"), ("held-out pairs", "held_out/margin"),
         ("gap", "gap/margin")),
        "A growing gap, training − held-out, shows overfitting.",
    ),
    (
        "Preference accuracy",
        "share of pairs",
        (("training pairs", "train_probe/accuracy"), ("held-out pairs", "held_out/accuracy"),
         ("held-out, by log-probability per token", "held_out/logp_accuracy")),
        "Before training the policy equals its reference, so accuracy is ½ by definition. The accuracy by "
        "log-probability per token needs no reference; before training it is the base model's.",
    ),
    (
        "Drift from the reference",
        "log-probability of a response − the reference's, nats",
        (("held-out chosen", "held_out/drift_chosen"), ("held-out rejected", "held_out/drift_rejected")),
        "A falling line of the chosen responses shows that they are unlearnt along with the rejected ones.",
    ),
    (
        "Balance weights",
        "mean weight of a response",
        (("chosen", "train/weight_chosen"), ("rejected", "train/weight_rejected"),
         ("difference in a pair", "train/imbalance")),
        "The better comprehended response of a pair has the smaller weight.",
    ),
    (
        "Safety during training",
        "share of prompts",
        (("harmful refused", "safety/refusal_harmful"), ("jailbreaks refused", "safety/refusal_jailbreak"),
         ("benign refused", "safety/over_refusal")),
        "By refusal phrases, which recognise refusals but not harm.",
    ),
    ("Learning rate", "learning rate", (("learning rate", "train/lr"),), ""),
    ("Gradient", "norm before clipping", (("gradient norm", "train/grad_norm"),), ""),
)  # fmt: skip


def read_curves(metrics: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Return steps and values of each column of a `metrics.csv`; an empty mapping if there is no file."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    if not metrics.is_file():
        return curves
    with metrics.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if name in ("step", "epoch") or not text or not row.get("step"):
                    continue
                steps, values = curves.setdefault(name, ([], []))
                steps.append(float(row["step"]))
                values.append(float(text))
    return curves


def run_page(
    title: str,
    settings: Mapping[str, str],
    rows: Sequence[Sequence[str]],
    said: Sequence[tuple[str, str]],
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    device: str,
    seconds: float,
    sets: Sequence[str] = (),
    completions: Sequence[Row] = (),
    shows_texts: bool = False,
    single: bool = False,
) -> Page:
    """Build the report.

    Args:
        title: title, which names the model.
        settings: settings of the run, by name.
        rows: rows of the final table.
        said: remarks about the table: (level, sentence).
        curves: curves from `read_curves`.
        device: name of the device.
        seconds: duration of the run.
        sets: names of the held-out sets, the monitored one first.
        completions: sample completions.
        shows_texts: include texts of the completions, with a warning.
        single: true if the run trains on single answers with a label.
    """
    page = Page("Training run", title, settings)
    levels = {"warning": "problem", "notice": "notice"}
    page.findings([Finding(levels.get(level, "fine"), sentence) for level, sentence in said])  # type: ignore[arg-type]
    section = page.section("What changed")
    section.table(Table(["", "n", "before", "after"], [list(row) for row in rows], "With 95 % intervals"))
    _curves(page.section("Curves", "By optimiser step."), curves, sets, single)
    add_completions(page, completions, shows_texts)
    facts = {
        "bdpo-pl": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "time": f"{seconds:.0f} s",
    }
    environment = page.section("Environment", "The whole configuration is in config.yaml beside this file.")
    environment.table(Table(["", ""], [list(item) for item in facts.items()], "Where it ran", "ll"))
    return page


def _curves(
    section: Section,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    sets: Sequence[str],
    single: bool,
) -> None:
    drawn = False
    for title, y_label, names, caption in _CURVES:
        metrics = [name.partition("/")[2] for _, name in names if name.startswith(f"{HELD_OUT}/")][:1]
        if title != "Drift from the reference":
            names += tuple((f"held-out, {one}", f"{HELD_OUT}/{one}/{metric}") for metric in metrics for one in sets[1:])
        lines: dict[str, Line] = {}
        left_out = 0
        for label, name in names:
            line, without = _finite(*curves.get(name, ((), ())))
            left_out += without
            if len(line.x) > 1:
                lines[worded(label, single)] = line
        if lines:
            shown, y_shown, said = (worded(text, single) for text in (title, y_label, caption))
            if left_out:
                said = f"{said} Not drawn, because not finite: {left_out} {plural(left_out, 'value')}.".strip()
            section.figure(line_chart(shown, lines, "optimiser step", y_shown, caption=said))
            drawn = True
    if not drawn:
        section.text("Too few steps were logged to draw a line; see trainer.log_every_n_steps.")


def _finite(steps: Sequence[float], values: Sequence[float]) -> tuple[Line, int]:
    """Return the line of the finite values, and the number of the others, such as the norm of a step that overflowed.

    Args:
        steps: optimiser steps.
        values: value at each step.
    """
    kept = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    return Line([step for step, _ in kept], [value for _, value in kept]), len(values) - len(kept)
