"""Conversion of a data source to a table of tokenised pairs, with a report of what happened to every row."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal

import numpy as np

from bdpo_pl.data.consistency import repeats
from bdpo_pl.data.encoding import encoded
from bdpo_pl.data.null_prompt import NullPrompts
from bdpo_pl.data.report import DUPLICATE, LABELS_DIFFER, DataReport
from bdpo_pl.data.rows import BOTH_UNSAFE, PreferenceRow, RowError, order_by_safety
from bdpo_pl.data.schemas import SCHEMAS
from bdpo_pl.data.schemas.preference import PREFERENCE
from bdpo_pl.data.schemas.safe_rlhf import SAFE_RLHF, SafeRLHF, SafeRLHFOptions
from bdpo_pl.data.schemas.schema import SAFETY_COLUMNS, Schema, SchemaContext
from bdpo_pl.data.sources import Record, read_records
from bdpo_pl.data.table import PairTable, prompt_digest
from bdpo_pl.data.tokenization import PairTokenizer, PreferencePair, ReadAs
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.errors import InputError

DataFormat = Literal["auto", "preference", "safe_rlhf", "hh_rlhf", "sharegpt", "orca", "azure", "kto", "single"]
BadRows = Literal["auto", "error", "drop"]


@dataclass
class LoadOptions:
    """Options for reading a source as pairs.

    Args:
        format: schema of the rows; `auto` takes the first that recognises the first row, and `single` for a loss that
            reads single answers.
        columns: mapping from our column names to yours, as in `{chosen: good_answer}`; yours must be in the data.
        ignore: columns of the data left out on purpose. Any other unread column that a model should read stops the run.
        bad_rows: treatment of a row that cannot be trained on: stop the run (`error`) or leave the row out and count it
            (`drop`). `auto`: `drop` for published sets that are known to contain such rows (PKU-SafeRLHF, HH-RLHF,
            KTO's), else `error`.
        duplicates: treatment of pairs that repeat an earlier pair token for token: leave them out and count them
            (`drop`), or `keep` them.
        safe_rlhf: selection of pairs from PKU-SafeRLHF.
    """

    format: DataFormat = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    ignore: list[str] = field(default_factory=list)
    bad_rows: BadRows = "auto"
    duplicates: Literal["drop", "keep"] = "drop"
    safe_rlhf: SafeRLHFOptions = field(default_factory=SafeRLHFOptions)

    def rename(self, record: Record, seen: dict[str, Record]) -> Record:
        """Return `record` under our column names, and add its own names to `seen`, each with the first record.

        Raises:
            RowError: the record lacks a column that an earlier one has, and would be read by another column of its own.
            InputError: an earlier record was read so, which lacks a column that this one has.
        """
        if not self.columns and not self.ignore:
            return record
        taken = {*self.columns.values(), *self.ignore}
        fields = {name: value for name, value in record.fields.items() if name not in taken}
        for ours, theirs in self.columns.items():
            if theirs in seen and theirs not in record.fields and ours in fields:
                raise RowError(record, f"missing {theirs}", _lacks(ours, theirs, seen[theirs]))
            if theirs in record.fields and theirs not in seen and ours in seen and ours not in taken:
                raise InputError(f"{seen[ours].place}: {_lacks(ours, theirs, record)}")
        for name in record.fields:
            seen.setdefault(name, record)
        fields |= {ours: record.fields[theirs] for ours, theirs in self.columns.items() if theirs in record.fields}
        return Record(record.source, record.number, fields)


def _lacks(ours: str, theirs: str, other: Record) -> str:
    return (
        f"there is no {theirs!r}, which data.load.columns reads as {ours!r}, and {other.place} has it; the row's own "
        f"{ours!r} may mean something else. Give each row {theirs!r}, or make such rows a source of their own"
    )


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
    subset: str | None = None,
    single: bool = False,
    alone: bool = True,
) -> tuple[PairTable, DataReport]:
    """Read, check, select, tokenise, truncate and deduplicate the pairs of `source`.

    Args:
        name: name of the pairs in the report, for example `train`.
        source: file, folder or hub dataset, as in `read_records`.
        tokenizer: tokenizer of pairs for the model.
        truncation: policy for pairs longer than the window.
        options: options for reading the source.
        split: split of a hub dataset.
        revision: revision of a hub dataset.
        seed: seed of the draw from PKU-SafeRLHF.
        by_safety: put the safe response first and leave out pairs of two unsafe ones (`order_by_safety`); the source
            must label the safety of every response.
        subset: configuration of a hub dataset that has several.
        single: read single answers with a label, and no pairs.
        alone: refuse options about what the source does not have. False if the caller asks `check_used` about several
            sources with the same options, not each of which must have every column.

    Raises:
        InputError: unreadable source, missing column, a bad row under `error`, or nothing left to train on.
    """
    options = options or LoadOptions()
    report = DataReport(name, source)
    seen: dict[str, Record] = {}

    def renamed() -> Iterator[Record]:
        for record in read_records(source, split, revision, subset, report.unread):
            try:
                yield options.rename(record, seen)
            except RowError as error:
                report.read += 1
                refuse(error, record)

    records = renamed()
    first = next(records, None)
    if first is None:
        raise InputError(f"{source}: no rows")
    if single != (options.format == "single") and (not single or options.format != "auto"):
        raise InputError(
            f"data.load.format is {options.format}, but the loss reads "
            + ("single answers with a label: set it to single" if single else "pairs: single is for KTOLoss")
        )
    schema = _schema(first, "single" if single else options.format)
    if by_safety and not isinstance(schema, SafeRLHF):
        _require_safety(first)
    strict = options.bad_rows == "error" or (options.bad_rows == "auto" and not schema.is_messy)

    def refuse(error: RowError, record: Record) -> None:
        # The rule that leaves out a pair of unsafe responses is a choice, not a fault of the row.
        _refuse(error, record, report, strict and error.reason != BOTH_UNSAFE)

    report.notes["schema"] = schema.name
    context = SchemaContext(report, refuse, seed, options.safe_rlhf, options.ignore)
    rows = schema.rows(chain([first], records), context)
    if by_safety:
        rows = _by_safety(rows, report, strict)
    table = _tokenize(rows, tokenizer, truncation, options, report, strict)
    report.columns = list(seen)
    if alone:
        check_used(options, [report])
    if not len(table):
        raise InputError(_nothing_left(report, truncation))
    report.describe(table)
    return table, report


def _schema(first: Record, format: DataFormat) -> Schema:
    found = first.fields.keys()
    schema = next((s for s in SCHEMAS if s.name == format or (format == "auto" and s.recognises(first))), PREFERENCE)
    missing = [column for column in schema.required if column not in found]
    if missing:
        known = "; ".join(f"{s.name}: {', '.join(s.required)}" for s in SCHEMAS)
        raise InputError(
            f"{first.source}: missing column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))} of the "
            f"{schema.name} schema; found {', '.join(map(repr, found)) or 'none'}. Rename with data.load.columns "
            f"({{{missing[0]}: your_column}}) or set data.load.format (columns of each: {known})"
        )
    return schema


def check_used(options: LoadOptions, reports: Sequence[DataReport]) -> None:
    """Raise `InputError` if an option is about what no source has that was read with them, of which `reports` tell."""
    found = list(dict.fromkeys(column for report in reports for column in report.columns))
    sources = ", ".join(dict.fromkeys(report.source for report in reports))
    for option, names in (("columns", options.columns.values()), ("ignore", options.ignore)):
        for name in names:
            if name not in found:
                near = difflib.get_close_matches(name, found, n=1)
                raise InputError(
                    f"data.load.{option} names the column {name!r}, and no row of {sources} has it; "
                    + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(repr, found))}")
                )
    drawn = any(report.notes["schema"] == SAFE_RLHF.name for report in reports)
    if not drawn and options.safe_rlhf != SafeRLHFOptions():
        raise InputError(
            f"data.load.safe_rlhf draws pairs from PKU-SafeRLHF, and {sources} is read as "
            f"{', '.join(dict.fromkeys(report.notes['schema'] for report in reports))}: leave it out"
        )


def _require_safety(first: Record) -> None:
    missing = [column for column in SAFETY_COLUMNS if column not in first.fields]
    if missing:
        raise InputError(
            f"{first.source}: missing column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))}: the "
            "loss reads whether each response is safe (true or false). Add 'chosen_safe' and 'rejected_safe', "
            f"rename yours with data.load.columns ({{{missing[0]}: your_column}}), or choose a loss that needs neither"
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
    places: list[str] = []
    categories: list[str] = []
    safe: list[tuple[bool | None, bool | None]] = []
    desirable: list[bool] = []
    weights: list[float | None] = []
    whole_prompts: dict[int, bytes] = {}
    counts = {"merged": 0, "truncated": 0, "without an end": 0, "beside": 0}
    as_text: list[bool] = []
    bos = tokenizer.tokenizer.bos_token_id
    tokenizer.read_as = ReadAs()
    null_prompts = NullPrompts(tokenizer)

    def kept() -> Iterator[PreferencePair]:
        for row, pair in encoded(rows, tokenizer):
            if isinstance(pair, RowError):
                _refuse(pair, row.record, report, strict)
                continue
            if not as_text:
                as_text.append(tokenizer.reads_as_text(row))
                if as_text[0] and tokenizer.thoughts != "train":
                    raise InputError(
                        f"{row.record.place}: data.thoughts is {tokenizer.thoughts}, but the row is read as plain "
                        "text, in which no thought is looked for; leave it out, or give a template (data.chat_template)"
                    )
            elif as_text[0] is not tokenizer.reads_as_text(row):
                raise InputError(
                    f"{row.record.place}: some rows are dialogues that are read as plain text, and others are rendered "
                    "with the chat template; set data.dialogues to turns, or load them separately"
                )
            single = row.desirable is not None
            cut = truncation.apply(pair, bos, single)
            if cut is None:
                report.drop(_too_long(truncation, pair, single), row.record.place)
                continue
            counts["merged"] += pair.merged
            counts["truncated"] += not truncation.fits(pair, single)
            beside = len(cut.rejected_ids) < len(pair.rejected_ids)
            counts["without an end"] += len(cut.chosen_ids) < len(pair.chosen_ids) or (beside and not single)
            counts["beside"] += beside and single
            if len(cut.prompt_ids) < len(pair.prompt_ids):
                whole_prompts[len(places)] = prompt_digest(pair.prompt_ids)
            null_prompts.add(row)
            places.append(row.record.place)
            categories.append(row.category)
            safe.append((row.chosen_safe, row.rejected_safe))
            weights.append(row.weight)
            if row.desirable is not None:
                desirable.append(row.desirable)
            yield cut

    # Pair by pair into flat arrays: lists of numbers would take ten times the memory.
    table = PairTable.from_pairs(kept(), [])
    table = replace(
        table,
        places=places,
        categories=categories,
        safe=_safety(safe),
        weights=_weights(weights, places),
        desirable=np.array(desirable) if desirable else None,
    )
    table = table.with_null_prompts(null_prompts.of_rows()).with_whole_prompts(whole_prompts)
    report.note(f"truncated to {truncation.max_length} tokens ({truncation.mode})", counts["truncated"])
    report.note("of these, a response was cut and has no end", counts["without an end"])
    report.note("answers to another prompt, beside an answer, that were cut", counts["beside"])
    report.note("token merged across the prompt/response boundary: cut before it", counts["merged"])
    report.read_as(tokenizer)
    return _deduplicate(table, options.duplicates, report)


def _too_long(truncation: Truncation, pair: PreferencePair, single: bool) -> str:
    if truncation.loses_opening(pair, single):
        return (
            f"longer than {truncation.max_length} tokens, and keep_start does not find what opens the assistant's turn"
        )
    if truncation.fits(pair, single):
        return "the answer to another prompt beside it has nothing of its own once it is cut"
    if truncation.mode == "drop":
        return f"longer than {truncation.max_length} tokens"
    return "chosen = rejected once truncated, or nothing left to train on"


def _safety(flags: Sequence[tuple[bool | None, bool | None]]) -> np.ndarray | None:
    """Return the safety as (2, M) bool, or None if any response is unlabelled."""
    if not flags or any(None in both for both in flags):
        return None
    return np.array(flags, dtype=bool).T.copy()


def _weights(weights: Sequence[float | None], places: Sequence[str]) -> np.ndarray | None:
    """Return the weights as (M,) float32, or None if no row has one.

    Raises:
        InputError: some rows have a weight and others do not.
    """
    missing = [place for place, weight in zip(places, weights, strict=True) if weight is None]
    if len(missing) == len(weights):
        return None
    if missing:
        raise InputError(
            f"{missing[0]}: no 'weight', which other rows of the source have ({len(missing):,} rows lack it); give "
            "each row one, or leave the column out with --data.load.ignore '[weight]'"
        )
    return np.array(weights, dtype=np.float32)


def _deduplicate(table: PairTable, policy: Literal["drop", "keep"], report: DataReport) -> PairTable:
    found = repeats(table.pair_digests())
    if not found:
        return table
    if policy == "keep":
        report.note("duplicates kept", len(found))
        return table
    is_first = np.ones(len(table), dtype=bool)
    for at, _ in found:
        report.drop(DUPLICATE, table.places[at])
        is_first[at] = False
    report.note(LABELS_DIFFER, sum(table.labels_differ(at, table, other) for at, other in found))
    return table.select(np.flatnonzero(is_first))


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
