"""Interface of chat models, behind an endpoint or loaded here. Judges and attackers use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

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
