"""From a data source to a table of tokenised pairs, with a report of what happened to every row on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Literal, TypeVar

import numpy as np

from bdpo_pl.data.report import DataReport
from bdpo_pl.data.rows import BOTH_UNSAFE, PreferenceRow, RowError, order_by_safety
from bdpo_pl.data.schemas import preference, safe_rlhf
from bdpo_pl.data.schemas.safe_rlhf import SafeRLHFOptions
from bdpo_pl.data.sources import Record, read_records
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PairTokenizer, PreferencePair
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.errors import InputError

DataFormat = Literal["auto", "preference", "safe_rlhf"]
BadRows = Literal["auto", "error", "drop"]

_Parsed = TypeVar("_Parsed")
_ENCODE_AT_ONCE = 512


@dataclass
class LoadOptions:
    """How a source becomes pairs.

    Args:
        format: schema of the rows; `auto` takes PKU-SafeRLHF's where its columns are there, else the common one.
        columns: our column → yours, as in `{chosen: good_answer}`.
        bad_rows: a row that cannot be trained on stops the run (`error`) or is left out and counted (`drop`). `auto`:
            `error` for the common schema, `drop` for PKU-SafeRLHF, which is known to be messy.
        duplicates: pairs that repeat an earlier pair token for token are left out and counted (`drop`) or kept.
        safe_rlhf: which pairs of PKU-SafeRLHF to take.
    """

    format: DataFormat = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    bad_rows: BadRows = "auto"
    duplicates: Literal["drop", "keep"] = "drop"
    safe_rlhf: SafeRLHFOptions = field(default_factory=SafeRLHFOptions)


def load_pairs(
    name: str,
    source: str,
    tokenizer: PairTokenizer,
    truncation: Truncation,
    options: LoadOptions | None = None,
    split: str = "train",
    revision: str | None = None,
    seed: int = 0,
    by_safety: bool = False,
) -> tuple[PairTable, DataReport]:
    """Read, check, select, tokenise, truncate and deduplicate the pairs of `source`.

    Args:
        name: what to call them in the report, as in `train`.
        source: see `read_records`.
        tokenizer: the model's.
        truncation: policy for pairs longer than the window.
        options: see `LoadOptions`.
        split: split of a hub dataset.
        revision: revision of a hub dataset.
        seed: of the draw from PKU-SafeRLHF.
        by_safety: put the safe response first and leave out pairs of two unsafe ones (`order_by_safety`); the source
            must say of every response whether it is safe.

    Raises:
        InputError: unreadable source, missing column, a bad row under `error`, or nothing left to train on.
    """
    options = options or LoadOptions()
    report = DataReport(name, source)
    records = (_rename(record, options.columns) for record in read_records(source, split, revision))
    first = next(records, None)
    if first is None:
        raise InputError(f"{source}: no rows")
    schema = _schema(first, options.format)
    if by_safety and schema == "preference":
        _require_safety(first)
    strict = options.bad_rows == "error" or (options.bad_rows == "auto" and schema == "preference")
    rows = _rows(chain([first], records), schema, options, seed, report, strict)
    if by_safety:
        rows = _by_safety(rows, report, strict)
    table = _tokenize(rows, tokenizer, truncation, options, report, strict)
    if not len(table):
        raise InputError(_nothing_left(report, truncation))
    report.kept = len(table)
    report.lengths(table.prompt_lengths, table.chosen_lengths)
    return table, report


def _rename(record: Record, columns: dict[str, str]) -> Record:
    """`record` under our column names. A mapping that names an absent column is reported as that column missing."""
    if not columns:
        return record
    taken = set(columns.values())
    fields = {name: value for name, value in record.fields.items() if name not in taken}
    fields |= {ours: record.fields[theirs] for ours, theirs in columns.items() if theirs in record.fields}
    return Record(record.source, record.number, fields)


def _schema(first: Record, format: DataFormat) -> str:
    found = first.fields.keys()
    if format == "auto":
        # Any of its unmistakable columns: a file that lost one should be told which, not be read as another schema.
        is_pku = bool(found & {"is_response_0_safe", "is_response_1_safe", "safer_response_id"})
        format = "safe_rlhf" if is_pku else "preference"
    required = safe_rlhf.REQUIRED_COLUMNS if format == "safe_rlhf" else preference.REQUIRED_COLUMNS
    missing = [column for column in required if column not in found]
    if missing:
        raise InputError(
            f"{first.source}: missing column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))} of the "
            f"{format} schema; found {', '.join(map(repr, found)) or 'none'}. Rename with data.load.columns "
            f"({{{missing[0]}: your_column}}) or set data.load.format"
        )
    return format


def _rows(
    records: Iterable[Record], schema: str, options: LoadOptions, seed: int, report: DataReport, strict: bool
) -> Iterable[PreferenceRow]:
    def parsed(parse: Callable[[Record], _Parsed]) -> Iterator[_Parsed]:
        for record in records:
            report.read += 1
            try:
                yield parse(record)
            except RowError as error:
                # The rule that leaves out a pair of unsafe responses is a choice, not a fault of the row.
                _refuse(error, record, report, strict and error.reason != BOTH_UNSAFE)

    if schema == "preference":
        return parsed(preference.parse_preference)
    both_unsafe = options.safe_rlhf.both_unsafe
    kinds = parsed(lambda record: safe_rlhf.parse_safe_rlhf(record, both_unsafe))
    rows, drawn = safe_rlhf.draw_queries(kinds, options.safe_rlhf, seed)
    for kind, (asked, taken) in drawn.items():
        plural = kind.replace("query", "queries")
        report.notes[plural] = f"{taken:,}" if asked is None else f"{taken:,} of {asked:,} asked"
    report.note("not drawn (safe_rlhf.num_safe, num_unsafe)", report.read - report.num_dropped - len(rows))
    return rows


def _require_safety(first: Record) -> None:
    missing = [column for column in preference.SAFETY_COLUMNS if column not in first.fields]
    if missing:
        raise InputError(
            f"{first.source}: missing column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))}: the "
            "loss reads whether each response is safe (true or false). Add 'chosen_safe' and 'rejected_safe', "
            f"rename yours with data.load.columns ({{{missing[0]}: your_column}}), or take a loss that reads none"
        )


def _by_safety(rows: Iterable[PreferenceRow], report: DataReport, strict: bool) -> Iterator[PreferenceRow]:
    exchanged = 0
    for row in rows:
        try:
            ordered = order_by_safety(row)
        except RowError as error:
            _refuse(error, row.record, report, strict and error.reason != BOTH_UNSAFE)
            continue
        exchanged += ordered is not row
        yield ordered
    report.note("chosen and rejected exchanged: only the chosen was unsafe", exchanged)


def _tokenize(
    rows: Iterable[PreferenceRow],
    tokenizer: PairTokenizer,
    truncation: Truncation,
    options: LoadOptions,
    report: DataReport,
    strict: bool,
) -> PairTable:
    pairs: list[PreferencePair] = []
    kept: list[PreferenceRow] = []
    merged = truncated = 0
    null_prompt_ids: list[int] | None = None
    bos = tokenizer.tokenizer.bos_token_id
    for row, pair in _encoded(rows, tokenizer):
        if isinstance(pair, RowError):
            _refuse(pair, row.record, report, strict)
            continue
        if null_prompt_ids is None:
            null_prompt_ids = tokenizer.null_prompt_ids(row.rendered)
        cut = truncation.apply(pair, bos)
        if cut is None:
            reason = (
                f"longer than {truncation.max_length} tokens"
                if truncation.mode == "drop"
                else "chosen = rejected once truncated"
            )
            report.drop(reason, row.record.place)
            continue
        merged += pair.merged
        truncated += cut is not pair
        pairs.append(cut)
        kept.append(row)
    table = PairTable.from_pairs(
        pairs,
        null_prompt_ids or [],
        [row.record.place for row in kept],
        [row.category for row in kept],
        _safety(kept),
    )
    report.note(f"truncated to {truncation.max_length} tokens ({truncation.mode})", truncated)
    report.note("token merged across the prompt/response boundary: cut before it", merged)
    return _deduplicate(table, options.duplicates, report)


def _safety(rows: Sequence[PreferenceRow]) -> np.ndarray | None:
    """(2, M) bool, or None where it is not said of all."""
    flags = [(row.chosen_safe, row.rejected_safe) for row in rows]
    if not flags or any(None in both for both in flags):
        return None
    return np.array(flags, dtype=bool).T.copy()


def _encoded(
    rows: Iterable[PreferenceRow], tokenizer: PairTokenizer
) -> Iterator[tuple[PreferenceRow, PreferencePair | RowError]]:
    rows = iter(rows)
    while chunk := list(islice(rows, _ENCODE_AT_ONCE)):
        yield from zip(chunk, tokenizer.encode(chunk), strict=True)


def _deduplicate(table: PairTable, policy: Literal["drop", "keep"], report: DataReport) -> PairTable:
    seen: dict[bytes, int] = {}
    first = [seen.setdefault(digest, i) == i for i, digest in enumerate(table.pair_digests())]
    repeats = [i for i, is_first in enumerate(first) if not is_first]
    if not repeats:
        return table
    if policy == "keep":
        report.note("duplicates kept", len(repeats))
        return table
    for i in repeats:
        report.drop("duplicate of an earlier pair", table.places[i])
    return table.select(np.flatnonzero(first))


def _refuse(error: RowError, record: Record, report: DataReport, strict: bool) -> None:
    if strict:
        raise InputError(f"{error}. To leave such rows out and count them: data.load.bad_rows=drop") from None
    report.drop(error.reason, record.place)


def _nothing_left(report: DataReport, truncation: Truncation) -> str:
    reasons = (
        "; ".join(f"{reason}: {len(places):,}" for reason, places in report.dropped.items()) or "no rows were drawn"
    )
    message = f"{report.source}: none of its {report.read:,} rows can be used ({reasons})"
    if any(reason.startswith("longer than") for reason in report.dropped):
        message += (
            f". Raise data.max_length (now {truncation.max_length}) or set data.truncation to keep_start or keep_end"
        )
    return message
