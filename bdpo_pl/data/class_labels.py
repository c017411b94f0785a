"""Class labels of Hugging Face datasets: numbers, each with the name of its class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class ClassLabel(int):
    """The number of a class, whose text is the name of the class.

    Attributes:
        name: name of the class; "" for −1, which means that the class is unknown.
    """

    name: str = ""

    def __str__(self) -> str:
        return self.name


def class_names(features: Mapping[str, object]) -> dict[str, Sequence[str]]:
    """Return the names of the classes, by column, of a dataset's columns of class labels or of lists of them."""
    labels = {column: getattr(feature, "feature", feature) for column, feature in features.items()}
    return {column: label.names for column, label in labels.items() if hasattr(label, "names")}


def with_names(fields: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the fields of a row, with a `ClassLabel` for each class label."""
    return {column: _named(value, names[column]) if column in names else value for column, value in fields.items()}


def _named(value: object, names: Sequence[str]) -> object:
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    if not isinstance(value, int):
        return value
    number = ClassLabel(value)
    number.name = names[value] if value >= 0 else ""
    return number
