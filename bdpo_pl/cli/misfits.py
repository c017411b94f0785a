"""Refusal of unsuitable values: `null`, which the parser accepts for any option, and values that a class refuses."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from bdpo_pl.errors import InputError, first_line

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list"}
"""Description of the values that an option takes, by its type."""


def check_nulls(options: object, hints: Mapping[str, Any]) -> None:
    """Check that no option among `options` is `null` unless its type allows that.

    Args:
        options: Nested mappings or namespaces, as returned by a parser.
        hints: Type hint of each option, by its full name; options without one may have any value.

    Raises:
        InputError: An option is `null` that may not be; the message says what it takes.
    """
    for name, hint in hints.items():
        value = options
        for part in name.split("."):
            value = _items(value).get(part, _ABSENT)
        for found, expected in _nulls(value, hint, name):
            raise InputError(f"--{found} must be {_shown(expected)}; got null. Leave it out for its default")


def refuse_misfit(error: ValueError) -> NoReturn:
    """Raise an error that says in one line why the options do not fit their classes.

    Args:
        error: Error of the parser, which lists its attempts, with the reason in the middle.

    Raises:
        InputError: `error` in one line, or unchanged if it already says what to do.
    """
    if isinstance(error, InputError) or isinstance(error.__cause__, InputError):
        raise error
    reasons = [line.strip(" -") for line in str(error).splitlines() if line.startswith("  - ")]
    # A class that refuses its values says why; that they are not of another type, such as a text, says nothing.
    reasons.sort(key=lambda reason: reason.startswith("Expected a "))
    given = [line for line in str(error).splitlines() if line.startswith("Given value: ")]
    raise InputError("; ".join([f"these options do not fit: {(reasons or [first_line(error)])[0]}", *given])) from error


_ABSENT = object()


def _nulls(value: object, hint: object, name: str) -> Iterator[tuple[str, object]]:
    """Yield each option at or below `name` that is null and may not be, with its type hint."""
    if value is None:
        if not _may_be_null(hint):
            yield name, hint
        return
    items = _items(value)
    if "class_path" in items:
        arguments = _items(items.get("init_args"))
        for argument, expected in _arguments(items["class_path"]).items():
            yield from _nulls(arguments.get(argument, _ABSENT), expected, f"{name}.{argument}")
    elif items:
        for kind in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(kind):
                for field, expected in typing.get_type_hints(kind).items():
                    yield from _nulls(items.get(field, _ABSENT), expected, f"{name}.{field}")


def _items(value: object) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    return vars(value) if type(value).__name__ == "Namespace" else {}


def _may_be_null(hint: object) -> bool:
    if hint is None or hint is Any or isinstance(hint, str | typing.TypeVar):
        return True
    return hint is type(None) or type(None) in typing.get_args(hint) or None in typing.get_args(hint)


def _arguments(path: object) -> dict[str, object]:
    """Return the type hints of a class's arguments, without those whose default is null; empty if there are none."""
    module, _, name = str(path).rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)
        function = made.__init__ if isinstance(made, type) else made  # type: ignore[misc]  # a class, no instance
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters
    except (ImportError, AttributeError, NameError, TypeError, ValueError):
        return {}
    return {name: hint for name, hint in hints.items() if name in parameters and parameters[name].default is not None}


def _shown(hint: Any) -> str:
    allowed = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, allowed))
    if hint in KINDS or typing.get_origin(hint) in KINDS:
        return KINDS[hint if hint in KINDS else typing.get_origin(hint)]
    if allowed and all(kind in KINDS for kind in allowed):
        return " or ".join(dict.fromkeys(KINDS[kind] for kind in allowed))
    return str(getattr(hint, "__name__", hint)).replace("typing.", "")
