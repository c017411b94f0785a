"""The part of `bdpo_pl.diagnose` for single answers with a label, on which KTO trains."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from bdpo_pl.console import paths_table
from bdpo_pl.data.splits import PreferenceSplits
from bdpo_pl.diagnosis.estimators import MEANINGS
from bdpo_pl.diagnosis.single import SingleDiagnosis, diagnose_single, label_balance, measures
from bdpo_pl.diagnosis.single_page import findings, single_page, single_table
from bdpo_pl.errors import InputError
from bdpo_pl.files import write_whole
from bdpo_pl.losses import PreferenceLoss
from bdpo_pl.reporting.terminal import findings_table
from bdpo_pl.scoring.scores import SplitScores


def check_single(options: Mapping[str, object], defaults: Mapping[str, object], loss: PreferenceLoss) -> None:
    """Refuse options of the report that compare the two responses of a pair.

    Args:
        options: options of the report, by name.
        defaults: their defaults.
        loss: loss that reads single answers.

    Raises:
        InputError: such an option is not at its default.
    """
    for name, given in options.items():
        if name != "folder" and given != defaults[name]:
            raise InputError(
                f"diagnose.{name} is about the two responses of a pair, but model.loss is "
                f"{type(loss).__name__}, which reads single answers: leave it out"
            )


def report_single(
    splits: PreferenceSplits,
    scores: Mapping[str, SplitScores],
    loss: PreferenceLoss,
    facts: dict[str, str],
    notes: list[str],
    folder: Path,
    console: Console,
) -> None:
    """Diagnose, write the report, the numbers and a row for each answer into `folder`, and print the main numbers."""
    train = splits.tables["train"]
    found, lines = {}, []
    for name, split in scores.items():
        assert split.reference is not None
        assert split.comprehension is not None
        table = splits.tables[name]
        assert table.desirable is not None
        values = measures(table, split.comprehension.double().numpy(), split.reference.double().numpy())
        found[name] = diagnose_single(table, values, None if name == "train" else train)
        for i, (place, label) in enumerate(zip(table.places, table.desirable.tolist(), strict=True)):
            row = {measure: float(value[i]) for measure, value in values.items()}
            lines.append(json.dumps({"split": name, "place": place, "label": label, **row}, ensure_ascii=False) + "\n")
    weights = (getattr(loss, f"{side}desirable_weight", 1.0) for side in ("", "un"))
    diagnosis = SingleDiagnosis(
        facts,
        MEANINGS[loss.estimator].unit,
        found,
        label_balance(found["train"].good, found["train"].bad, *weights),
        notes,
        loss.estimator,
    )
    paths = {
        "report": single_page(diagnosis).write(folder / "report.html"),
        "numbers": write_whole(
            folder / "diagnosis.json", json.dumps(diagnosis.to_json(), indent=2, ensure_ascii=False) + "\n"
        ),
        "each answer": write_whole(folder / "answers.jsonl", "".join(lines)),
    }
    console.print(single_table(diagnosis))
    console.print(findings_table(findings(diagnosis)))
    console.print(paths_table(paths))
