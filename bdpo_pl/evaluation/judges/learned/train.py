"""Train the learned judge: `python -m bdpo_pl.evaluation.judges.learned.train LABELS_FOLDER`.

LABELS_FOLDER holds `jbb_human_labels` and `pyrit_refusal_labels` (docs/evaluation.md states their sources). Answers of
JailbreakBench that people labelled unsafe are used as compliances. Whether the others refuse is not known, so they are
left out. The script writes the weights and the card beside this file. No choice depends on a test set: the strength of
the penalty is fixed, and each set is predicted once by a judge trained without it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from bdpo_pl.console import get_console
from bdpo_pl.evaluation.judges.agreement import measure_agreement, read_labelled
from bdpo_pl.evaluation.judges.judge import Judge
from bdpo_pl.evaluation.judges.learned.features import WIDTH, matrix
from bdpo_pl.evaluation.judges.learned.refusal_model import CARD_FILE, NAME, WEIGHTS_FILE, LearnedJudge
from bdpo_pl.evaluation.judges.learned.written_answers import written_answers
from bdpo_pl.evaluation.judges.measuring import NotRefused, cells
from bdpo_pl.evaluation.judges.phrases import PhraseJudge

PENALTY = 1.0
WRITTEN = 500
"""Number of written answers of each kind."""
_WRITTEN_WEIGHT = 0.5
_OTHER_MEANING = "refusal_extra"


@dataclass(frozen=True)
class Examples:
    """Answers and whether they refuse, with the weight of each answer."""

    pairs: Sequence[tuple[str, str]]
    refuses: np.ndarray
    weight: float


def fit(sets: Sequence[Examples], penalty: float = PENALTY) -> np.ndarray:
    """Fit the (WIDTH,) weights of a logistic regression with a squared penalty on all but the constant."""
    from scipy.optimize import minimize  # type: ignore[import-untyped]
    from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

    rows = csr_matrix(np.concatenate([matrix(one.pairs) for one in sets]))
    labels = np.concatenate([one.refuses for one in sets]).astype(np.float64)
    weights = np.concatenate([np.full(len(one.pairs), one.weight) for one in sets])
    penalties = np.full(WIDTH, penalty)
    penalties[-1] = 0.0

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        logits = rows @ theta
        value = float((weights * (np.logaddexp(0.0, logits) - labels * logits)).sum())
        gradient = rows.T @ (weights * (1.0 / (1.0 + np.exp(-logits)) - labels))
        return value + 0.5 * float((penalties * theta * theta).sum()), gradient + penalties * theta

    return minimize(loss, np.zeros(WIDTH), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x


def written(count: int = WRITTEN, seed: int = 0) -> Examples:
    """Return the project's own answers."""
    rows = list(written_answers(count, seed))
    return Examples([(p, r) for p, r, _ in rows], np.array([refuses for *_, refuses in rows]), _WRITTEN_WEIGHT)


def labelled(path: Path) -> Examples:
    """Read answers labelled as refusals or not; from labels of harm only unsafe answers, which do not refuse."""
    question, rows = read_labelled(path)
    # PyRIT's second file calls an answer to another question a refusal, unlike all reports here.
    rows = [row for row in rows if row.case != _OTHER_MEANING]
    if question == "unsafe":
        rows = [row for row in rows if row.positive]
    refuses = np.array([question == "refused" and row.positive for row in rows])
    return Examples([(row.exchange.prompt, row.exchange.response) for row in rows], refuses, 1.0)


def main(folder: Path) -> None:
    """Train the judge, and write its weights and card."""
    files = {path.name.split(".")[0]: path for path in sorted(folder.glob("*.jsonl*"))}
    sets = {name: labelled(path) for name, path in files.items()}
    theta = fit([written(), *sets.values()])
    save_file({NAME: theta.astype(np.float16)}, str(WEIGHTS_FILE))
    card: dict[str, Any] = {
        "what": "logistic regression on hashed n-grams of words, kinds of refusal phrases and the shape of the answer",
        "says": "whether an answer refuses; nothing of harm",
        "trained on": {
            "written by this project": f"{2 * WRITTEN} answers from harmless templates, MIT",
            **{name: f"{len(one.pairs)} answers labelled by people, MIT" for name, one in sets.items()},
        },
        "penalty": PENALTY,
        "measured on sets held out from training": {
            name: _held_out(path, [one for other, one in sets.items() if other != name]) for name, path in files.items()
        },
    }
    CARD_FILE.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    get_console().print(f"wrote {WEIGHTS_FILE} and {CARD_FILE}")


def _held_out(path: Path, others: Sequence[Examples]) -> dict[str, dict[str, str]]:
    """Measure a judge trained without the file at `path` on that file, and the phrase judge for comparison."""
    learned = LearnedJudge()
    learned.weights = fit([written(), *others])
    question, rows = read_labelled(path)
    found = {}
    judges: tuple[Judge, ...] = (PhraseJudge(), learned)
    for judge in judges:
        asked = judge if question == "refused" else NotRefused(judge)
        measured = dict(
            zip(
                ("agreement", "kappa", "recall", "precision"),
                cells(measure_agreement(asked, question, rows)),
                strict=True,
            )
        )
        found[judge.name] = {"answers": str(len(rows)), "asked": question, **measured}
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
