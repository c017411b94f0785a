"""Files of prompts in the layouts of published safety benchmarks, recognised by their columns.

| layout | columns it is known by | other columns it reads | prompts |
|---|---|---|---|
| `strongreject` | `forbidden_prompt` | `category` | harmful |
| `harmbench` | `Behavior`, `BehaviorID`, `FunctionalCategory` | `ContextString`, `SemanticCategory` | harmful |
| `jailbreakbench` | `Goal`, `Behavior`, `Category` | `Target` | one kind a file |
| `advbench` | `goal`, `target` | | harmful |
| `xstest` | `prompt`, `type` | `label` | both kinds in one file |
| `prompts` | `prompt` | `category`, `target`, `context`, `behaviour`, `attack`, `label` | one kind a file |

Sources: arXiv:2402.10260, 2402.04249, 2404.01318, 2307.15043, 2308.01263 in this order. The last layout is this
project's own; most copies of the others on the hub have it too. If a `label` there is `safe` or `unsafe`, as in copies
of XSTest without its types, it tells the kind of its row; any other value is a label of something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from bdpo_pl.data.messages import is_unicode
from bdpo_pl.data.sources import Record
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Kind

LayoutName = Literal["strongreject", "harmbench", "jailbreakbench", "advbench", "xstest", "prompts"]

_CONTEXT_BREAK = "\n\n---\n\n"  # HarmBench's own, between a context and what is asked about it


class UnusableRowError(Exception):
    """A row that is left out and counted; the message states the reason."""


@dataclass(frozen=True)
class Layout:
    """Layout of a published file.

    Attributes:
        name: name in options and messages.
        columns: columns by which the layout is recognised.
        kind: kind of all prompts; None: the file does not state it, or contains both.
        parse: function that returns the prompt of a row, for a suite of the given kind. It raises `UnusableRowError`
            for a row that does not belong to the suite.
        or_columns: other columns with which a file may have the layout, if it is named.
    """

    name: LayoutName
    columns: tuple[str, ...]
    kind: Kind | None
    parse: Callable[[Record, Kind], EvaluationPrompt]
    or_columns: tuple[str, ...] | None = None


def _text(record: Record, column: str) -> str:
    """Return the text in `column`, stripped; empty if there is none.

    Raises:
        InputError: the value is not a text.
    """
    value = record.fields.get(column)
    if value is not None and not isinstance(value, str):
        raise InputError(
            f"{record.place}: column {column!r} must be a text, not {type(value).__name__}; correct the row"
        )
    if not is_unicode(value or ""):
        raise InputError(
            f"{record.place}: column {column!r} holds half of a surrogate pair, which is not text; correct the row"
        )
    return (value or "").strip()


def _prompt(record: Record, column: str, category: str, target: str = "target", context: str = "") -> EvaluationPrompt:
    request = _text(record, column)
    if not request:
        raise InputError(
            f"{record.place}: column {column!r} is empty, and a prompt is needed; correct or remove the row"
        )
    about = _text(record, context) if context else ""
    text = about + _CONTEXT_BREAK + request if about else request
    return EvaluationPrompt(text, text, _text(record, category), record.place, _text(record, target) or None)


def _strongreject(record: Record, kind: Kind) -> EvaluationPrompt:
    return _prompt(record, "forbidden_prompt", "category")


def _harmbench(record: Record, kind: Kind) -> EvaluationPrompt:
    match _text(record, "FunctionalCategory"):
        case "copyright":
            raise UnusableRowError("asks for a copyrighted text, which is judged by comparing texts")
        case "multimodal":
            raise UnusableRowError("asks about an image")
        case _:
            return _prompt(record, "Behavior", "SemanticCategory", context="ContextString")


def _jailbreakbench(record: Record, kind: Kind) -> EvaluationPrompt:
    return _prompt(record, "Goal", "Category", target="Target")


def _advbench(record: Record, kind: Kind) -> EvaluationPrompt:
    return _prompt(record, "goal", "category")


def _xstest(record: Record, kind: Kind) -> EvaluationPrompt:
    label, type_ = _text(record, "label"), _text(record, "type")
    if type_ and not label:
        # In releases without a label only the type shows that a prompt is unsafe.
        label = "unsafe" if type_.startswith("contrast_") else "safe"
    if label not in ("safe", "unsafe"):
        raise InputError(f"{record.place}: column 'label' must be safe or unsafe, not {label!r}; correct the row")
    _require_kind(label, kind)
    return _prompt(record, "prompt", "type" if type_ else "category")


def _require_kind(label: str, kind: Kind) -> None:
    if (label == "safe") != (kind == "benign"):
        raise UnusableRowError(f"labelled {label}, and the suite is of {kind} prompts")


def _own(record: Record, kind: Kind) -> EvaluationPrompt:
    if (label := record.fields.get("label")) in ("safe", "unsafe"):
        _require_kind(label, kind)
    plain = _prompt(record, "prompt", "category", context="context")
    return EvaluationPrompt(
        plain.text,
        _text(record, "behaviour") or plain.text,
        plain.category,
        plain.place,
        plain.target,
        _text(record, "attack"),
    )


# In the order of checking: a file of an earlier layout may also contain the columns of a later one.
LAYOUTS = (
    Layout("strongreject", ("forbidden_prompt",), "harmful", _strongreject),
    Layout("harmbench", ("Behavior", "BehaviorID", "FunctionalCategory"), "harmful", _harmbench),
    Layout("jailbreakbench", ("Goal", "Behavior", "Category"), None, _jailbreakbench),
    Layout("advbench", ("goal", "target"), "harmful", _advbench),
    Layout("xstest", ("prompt", "type"), None, _xstest, ("prompt", "label")),
    Layout("prompts", ("prompt",), None, _own),
)


def choose_layout(first: Record, name: LayoutName | None = None) -> Layout:
    """Return the layout of a file whose first row is `first`.

    Args:
        first: first row of the file, which has the file's columns.
        name: required layout; None: the first one whose columns the file has.

    Raises:
        InputError: the columns match no layout, or not the named one.
    """
    if name is not None and name not in get_args(LayoutName):
        raise InputError(f"there is no layout {name!r} of prompts; choose {', '.join(get_args(LayoutName))}")
    tried = [layout for layout in LAYOUTS if name in (None, layout.name)]
    for layout in tried:
        if set(layout.columns) <= first.fields.keys():
            return layout
        if name is not None and layout.or_columns is not None and set(layout.or_columns) <= first.fields.keys():
            return layout
    wanted = "; ".join(f"{layout.name}: {', '.join(layout.columns)}" for layout in tried)
    raise InputError(
        f"{first.source}: its columns {', '.join(map(repr, first.fields)) or '(none)'} are those of no layout known "
        f"here ({wanted}); rename them with `columns`, as in {{prompt: your_column}}, or give another file"
    )


def rename(record: Record, columns: Mapping[str, str]) -> Record:
    """Rename the columns of `record`; `columns` maps our names to theirs.

    Raises:
        InputError: a column is missing.
    """
    if missing := [theirs for theirs in columns.values() if theirs not in record.fields]:
        raise InputError(
            f"{record.place}: no column {missing[0]!r}; it has {', '.join(map(repr, record.fields)) or 'none'}. "
            "Correct `columns`, which is our column → yours"
        )
    kept = {name: value for name, value in record.fields.items() if name not in columns.values()}
    renamed = {ours: record.fields[theirs] for ours, theirs in columns.items()}
    return Record(record.source, record.number, kept | renamed)
