"""The schema of PKU-SafeRLHF (licence CC BY-NC 4.0), and the selection of its pairs that teach safety.

`better_response_id` is the more helpful response, which may be unsafe, so it decides only between two safe responses.
If one response is unsafe, the safe one is chosen, as in the B-DPO paper.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from bdpo_pl.data.rows import BOTH_UNSAFE, PreferenceRow, RowError, check_row, parse_content
from bdpo_pl.data.schemas.preference import SHARED_COLUMNS
from bdpo_pl.data.schemas.schema import SafeRLHFOptions, Schema, SchemaContext, make_row
from bdpo_pl.data.sources import Record

REQUIRED_COLUMNS = (
    "prompt",
    *(f"response_{i}" for i in (0, 1)),
    *(f"is_response_{i}_safe" for i in (0, 1)),
    "better_response_id",
    "safer_response_id",
)
"""Columns of all its releases: those of 10,000 and 30,000 rows have no severity and no harm categories."""

SAFE_QUERY = "safe query"
UNSAFE_QUERY = "unsafe query"


class SafeRLHF(Schema):
    """The schema of PKU-SafeRLHF's rows, and the draw among them."""

    def recognises(self, first: Record) -> bool:
        """Return true if any of its distinctive columns is there; a missing one is then named in an error."""
        return bool(first.fields.keys() & {"is_response_0_safe", "is_response_1_safe", "safer_response_id"})

    def rows(self, records: Iterable[Record], context: SchemaContext) -> Iterable[PreferenceRow]:
        """Return the drawn rows, in file order."""
        options, report = context.safe_rlhf, context.report
        kinds = self._parsed(records, context, lambda record: parse_safe_rlhf(record, options.both_unsafe))
        rows, drawn = draw_queries(kinds, options, context.seed)
        for kind, (asked, taken) in drawn.items():
            plural = kind.replace("query", "queries")
            report.notes[plural] = f"{taken:,}" if asked is None else f"{taken:,} of {asked:,} asked"
        report.note("not drawn (safe_rlhf.num_safe, num_unsafe)", report.read - report.num_dropped - len(rows))
        return rows


SAFE_RLHF = SafeRLHF(
    "safe_rlhf",
    REQUIRED_COLUMNS,
    SHARED_COLUMNS,
    is_messy=True,
    about="PKU-SafeRLHF in all its releases; the safe response is chosen",
)


def parse_safe_rlhf(record: Record, both_unsafe: Literal["drop", "safer"] = "drop") -> tuple[str, PreferenceRow]:
    """Return (`SAFE_QUERY` or `UNSAFE_QUERY`, the preference row) of a PKU-SafeRLHF record.

    Raises:
        RowError: a field is missing or of the wrong type, or both responses are unsafe and `both_unsafe` is `drop`.
    """
    prompt = _text(record, "prompt")
    responses = [_text(record, "response_0"), _text(record, "response_1")]
    safe = [_boolean(record, "is_response_0_safe"), _boolean(record, "is_response_1_safe")]
    if all(safe):
        kind, chosen = SAFE_QUERY, _response_id(record, "better_response_id")
    elif any(safe):
        kind, chosen = UNSAFE_QUERY, safe.index(True)
    elif both_unsafe == "safer":
        kind, chosen = UNSAFE_QUERY, _response_id(record, "safer_response_id")
    else:
        raise RowError(
            record,
            BOTH_UNSAFE,
            "both responses are unsafe; safe_rlhf.both_unsafe=safer takes the safer one",
        )
    row = make_row(record, prompt, responses[chosen], responses[1 - chosen])
    row = replace(
        row,
        category=_category(record, 1 - chosen) or row.category,
        chosen_safe=safe[chosen],
        rejected_safe=safe[1 - chosen],
    )
    return kind, check_row(row)


def draw_queries(
    rows: Iterable[tuple[str, PreferenceRow]], options: SafeRLHFOptions, seed: int
) -> tuple[list[PreferenceRow], dict[str, tuple[int | None, int]]]:
    """Return the rows to train on, in file order, and (number requested, number taken) of each kind of query.

    If a number is requested, queries are drawn without replacement by `seed`, one pair of each.
    """
    by_kind: dict[str, list[PreferenceRow]] = {SAFE_QUERY: [], UNSAFE_QUERY: []}
    for kind, row in rows:
        by_kind[kind].append(row)
    generator = random.Random(seed)  # noqa: S311 - a sample, not a secret
    taken: list[PreferenceRow] = []
    drawn: dict[str, tuple[int | None, int]] = {}
    for kind, asked in ((SAFE_QUERY, options.num_safe), (UNSAFE_QUERY, options.num_unsafe)):
        picked = by_kind[kind]
        if asked is not None:
            shuffled = generator.sample(picked, len(picked))
            one_each = {json.dumps(row.prompt, sort_keys=True): row for row in shuffled}
            picked = list(one_each.values())[:asked]
        drawn[kind] = (asked, len(picked))
        taken.extend(picked)
    taken.sort(key=lambda row: (row.record.source, row.record.number))
    return taken, drawn


def _field(record: Record, name: str) -> Any:
    value = record.fields.get(name)
    if value is None:
        raise RowError(record, f"missing {name}", f"field '{name}' is missing or null")
    return value


def _text(record: Record, name: str) -> str:
    value = parse_content(record, name, record.fields.get(name))
    if not isinstance(value, str):
        raise RowError(record, "wrong type", f"field '{name}' must be text, got {type(value).__name__}")
    return value


def _boolean(record: Record, name: str) -> bool:
    value = _field(record, name)
    if not isinstance(value, bool):
        raise RowError(record, "wrong type", f"field '{name}' must be true or false, got {value!r:.40}")
    return value


def _response_id(record: Record, name: str) -> int:
    value = _field(record, name)
    if isinstance(value, bool) or value not in (0, 1):
        raise RowError(record, "wrong type", f"field '{name}' must be 0 or 1, got {value!r:.40}")
    return int(value)


def _category(record: Record, response: int) -> str:
    """Return the harm categories of one response as a label; the field is a mapping of category → bool."""
    categories = record.fields.get(f"response_{response}_harm_category")
    if not isinstance(categories, dict):
        return ""
    return ", ".join(sorted(name for name, present in categories.items() if present is True))
