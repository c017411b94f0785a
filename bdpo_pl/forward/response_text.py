"""Text of generated tokens: without special tokens, but with thoughts marked as such.

Some tokenizers have special tokens around thoughts. Without them, a thought would be read as part of the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bdpo_pl.data.chat_template import THOUGHT_MARK, opened_thought
from bdpo_pl.data.tokenizer_like import TokenizerLike

_CHANNEL, _MESSAGE = "<|channel|>", "<|message|>"
# The channel of gpt-oss for what the user sees; the others are for thoughts and calls of tools.
_ANSWER = "final"
_LAST_TOKENS = 8


def begins_in_thought(tokenizer: TokenizerLike, prompt: Sequence[int]) -> bool:
    """Return true if what is generated after the tokens of `prompt` begins within a thought, without its mark."""
    return opened_thought(tokenizer.decode(list(prompt[-_LAST_TOKENS:]))) is not None


class ResponseText:
    """A function from the generated tokens of a response to its text.

    The marks `<think>`, `</think>`, `<thinking>` and `</thinking>` remain in the text also if they are special tokens.
    A response in the channels of gpt-oss becomes `<think>`, what is in other channels than the final one, `</think>`
    and the final one; `</think>` is left out if there is no final one.

    Args:
        tokenizer: tokenizer of the model.

    Attributes:
        is_special: true if the tokenizer has special tokens around thoughts.
    """

    def __init__(self, tokenizer: TokenizerLike) -> None:
        self._tokenizer = tokenizer
        self._special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._has_channels = {_CHANNEL, _MESSAGE} <= set(self._special.values())
        self.is_special = self._has_channels or any(map(THOUGHT_MARK.fullmatch, self._special.values()))

    def __call__(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`, without blanks around it."""
        pieces = list(self._pieces(tokens)) if self.is_special else []
        names = {name for name, _ in pieces}
        if self._has_channels and _CHANNEL in names:
            return _in_channels(pieces)
        if any(map(THOUGHT_MARK.fullmatch, names)):
            return "".join((name if THOUGHT_MARK.fullmatch(name) else "") + text for name, text in pieces).strip()
        return self._decode(tokens).strip()

    def _pieces(self, tokens: Sequence[int]) -> Iterator[tuple[str, str]]:
        """Yield each special token ("" for the beginning) and the text up to the next one."""
        name, start = "", 0
        for end, token in enumerate(tokens):
            if token in self._special:
                yield name, self._decode(tokens[start:end])
                name, start = self._special[token], end + 1
        yield name, self._decode(tokens[start:])

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def _in_channels(pieces: Sequence[tuple[str, str]]) -> str:
    """Return the thoughts and the answer in the pieces of a response in channels."""
    channel, thoughts, answers = _ANSWER, list[str](), list[str]()
    for name, text in pieces:
        if name == _CHANNEL:
            channel = text.strip()
        if name in ("", _MESSAGE):
            (answers if channel == _ANSWER else thoughts).append(text.strip())
    thought = "\n".join(filter(None, thoughts))
    if channel != _ANSWER:
        return f"<think>{thought}"
    return (f"<think>{thought}</think>" if thought else "") + "\n".join(filter(None, answers))
