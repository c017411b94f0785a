"""Models one can talk to: behind an endpoint, or loaded here. Judges and attackers speak through this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

Message = Mapping[str, str]
"""`role` (system, user, assistant) and `content`."""


class ChatModel(Protocol):
    """Answers conversations.

    Attributes:
        name: as in reports.
    """

    name: str

    def reply(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """The next turn of each conversation, in order.

        Raises:
            InputError: it cannot be reached or answers with an error, after retries.
        """
        ...
