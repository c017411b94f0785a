"""Prompts that a judge was trained with as a whole, with their own markers and without a chat template."""

from __future__ import annotations

import re

from bdpo_pl.data.chat_template import chat_encoder
from bdpo_pl.data.control_tokens import Spelled
from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.evaluation.chat.chat_model import Message
from bdpo_pl.evaluation.judges.judge import Exchange

_FIELD = re.compile(r"\{(prompt|response)\}")


class Filled(str):
    """A prompt that remembers which of its parts are the form's own, and which come from the exchange.

    Attributes:
        pieces: parts of the prompt; every second one comes from the exchange.
    """

    pieces: tuple[str, ...]

    def __new__(cls, form: str, exchange: Exchange) -> Filled:
        """Put the request and the answer into `form`, for `{prompt}` and `{response}`."""
        fields = {"prompt": exchange.prompt, "response": exchange.response}
        pieces = [fields[part] if i % 2 else part for i, part in enumerate(_FIELD.split(form))]
        filled = super().__new__(cls, "".join(pieces))
        filled.pieces = tuple(pieces)
        return filled


def one_turn(form: str, exchange: Exchange) -> list[Message]:
    """Return `form` with the exchange in it, as the user's turn of a conversation."""
    return [{"role": "user", "content": Filled(form, exchange)}]


def encode_whole(tokenizer: TokenizerLike, conversation: list[Message]) -> list[int]:
    """Return the token ids of a prompt made by `one_turn`.

    The form's markers become control tokens; a control token that the exchange spells remains text.
    """
    content = conversation[-1]["content"]
    assert isinstance(content, Filled), "the conversation was not made by one_turn"
    control, spelled = chat_encoder(tokenizer).control, Spelled()
    text = "".join(control.protect(part, spelled) if i % 2 else part for i, part in enumerate(content.pieces))
    return control.encode([text], [spelled], add_special_tokens=True)[0]
