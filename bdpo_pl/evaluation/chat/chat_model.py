"""Interface of chat models, behind an endpoint or loaded here. Judges and attackers use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

Message = Mapping[str, str]
"""`role` (system, user, assistant) and `content`."""


class ChatModel(Protocol):
    """A model that answers conversations.

    Attributes:
        name: name in reports.
    """

    name: str

    def reply(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """Return the next turn of each conversation, in order.

        Raises:
            InputError: the model cannot be reached or answers with an error, after retries.
        """
        ...


@runtime_checkable
class Identified(Protocol):
    """A model that says what its replies depend on."""

    def facts(self) -> Mapping[str, str]:
        """Return everything that the replies depend on, besides the conversations."""
        ...


def model_facts(model: ChatModel) -> dict[str, str]:
    """Return what identifies `model` in saved state: its own facts, or only its name if it has none."""
    return {"name": model.name, **(model.facts() if isinstance(model, Identified) else {})}
