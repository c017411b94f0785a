"""Single answers with a label, as KTO trains on them: none needs another answer to its prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from bdpo_pl.data.rows import Content, PreferenceRow, RowError
from bdpo_pl.data.schemas.preference import SHARED_COLUMNS, make_pair
from bdpo_pl.data.schemas.published import Labelled, parse_labelled
from bdpo_pl.data.schemas.schema import Schema, SchemaContext
from bdpo_pl.data.sources import Record

_FURTHEST = 64
"""Rows that are looked through for an answer to another prompt."""


class Single(Schema):
    """The schema of single answers. Beside each stands the answer of an earlier row, to estimate KTO's divergence by.

    In a row, `chosen` is the answer itself, good or bad, and `rejected` the answer to another prompt.
    """

    def recognises(self, first: Record) -> bool:
        """Return false: a loss that reads labels asks for this schema; otherwise answers are paired (`kto`)."""
        return False

    def rows(self, records: Iterable[Record], context: SchemaContext) -> Iterable[PreferenceRow]:
        """Return a row for each answer."""
        answers = []
        for labelled in self._parsed(records, context, parse_labelled):
            try:
                # Alone, so that no row is refused for the answer that stands beside its own.
                _row(labelled, "b" if labelled.answer == "a" else "a")
            except RowError as error:
                context.refuse(error, labelled.record)
            else:
                answers.append(labelled)
        return self._beside_others(answers, context)

    def _beside_others(self, answers: Sequence[Labelled], context: SchemaContext) -> Iterator[PreferenceRow]:
        for place, labelled in enumerate(answers):
            other = _another(answers, place)
            try:
                if other is None:
                    raise RowError(
                        labelled.record,
                        "no answer to another prompt",
                        f"none of the {min(_FURTHEST, len(answers) - 1)} rows before it has another prompt and another "
                        "answer, by which KTO estimates how far the policy has drifted; shuffle the rows",
                    )
                row = _row(labelled, other.answer)
            except RowError as error:
                context.refuse(error, labelled.record)
                continue
            yield replace(row, desirable=labelled.is_good)


def _row(labelled: Labelled, beside: Content) -> PreferenceRow:
    return make_pair(labelled.record, labelled.prompt, labelled.answer, beside)


def _another(answers: Sequence[Labelled], place: int) -> Labelled | None:
    """Return the nearest row before `place`, in a circle, with another prompt and another answer of the same form."""
    own = answers[place]
    for back in range(1, min(_FURTHEST, len(answers) - 1) + 1):
        other = answers[place - back]
        if other.prompt != own.prompt and other.answer != own.answer and type(other.answer) is type(own.answer):
            return other
    return None


SINGLE = Single(
    "single",
    ("prompt", "completion", "label"),
    SHARED_COLUMNS,
    is_messy=True,
    about="prompt, completion, label: single answers, not paired, for KTOLoss",
)
