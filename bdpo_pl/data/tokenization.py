"""From preference rows to token ids, with a prompt/response boundary that cannot go wrong.

Prompt and response are always tokenised together and then cut, because tokenising them apart gives other tokens
wherever the tokenizer would have merged across the boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from bdpo_pl.data.rows import Content, Message, PreferenceRow, RowError, common_prefix_length
from bdpo_pl.errors import InputError

Ids = list[int]


@dataclass(frozen=True)
class PreferencePair:
    """Token ids of one pair. The model reads `prompt_ids + chosen_ids` and `prompt_ids + rejected_ids`.

    Attributes:
        prompt_ids: at least one token, begun by the BOS token where the tokenizer or the template puts one.
        chosen_ids: at least one token, ended by the end-of-turn or EOS token unless it was truncated.
        rejected_ids: likewise.
        merged: the tokenizer joined the prompt's end with a response's beginning, so the cut lies before that token.
    """

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    merged: bool = False


def padding_id(tokenizer: Any) -> int:
    """Fills padding, which the model does not see; any id will do."""
    return int(next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None))


class PairTokenizer:
    """Tokenises preference rows for one model.

    Args:
        tokenizer: a fast transformers tokenizer with an EOS token.
        chat_template: `auto` renders with the tokenizer's template if it has one (a text prompt becomes the user's
            turn); `none` takes texts as they are; anything else is the path of a Jinja template file.
        null_prompt: the user's words in the null prompt x₀ against which comprehension is measured.

    Raises:
        InputError: no EOS token, or an unreadable template.
    """

    def __init__(self, tokenizer: Any, chat_template: str = "auto", null_prompt: str = "") -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"tokenizer {tokenizer.name_or_path!r} has no EOS token, so a model cannot learn where a response "
                "ends; set eos_token in its tokenizer_config.json"
            )
        if chat_template not in ("auto", "none"):
            try:
                tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
            except OSError as error:
                raise InputError(f"data.chat_template: cannot read {chat_template} ({error.strerror})") from None
        self.tokenizer = tokenizer
        self.null_prompt = null_prompt
        self.uses_template = chat_template != "none" and bool(tokenizer.chat_template)
        self._special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids.add(tokenizer.eos_token_id)

    def null_prompt_ids(self, rendered: bool = False) -> Ids:
        """Token ids of the null prompt x₀, at least one.

        With a template, an empty user turn; without one (or for rows that are `rendered` already), the BOS token alone,
        or the EOS token for tokenizers with no BOS.
        """
        if self.uses_template and not rendered:
            text = self._render([{"role": "user", "content": self.null_prompt}], add_generation_prompt=True)
            return self._tokenize([text], add_special_tokens=False)[0]
        ids = self._tokenize([self.null_prompt], add_special_tokens=True)[0] if self.null_prompt else []
        bos = self.tokenizer.bos_token_id
        return ids or [bos if bos is not None else self.tokenizer.eos_token_id]

    def encode(self, rows: Sequence[PreferenceRow]) -> list[PreferencePair | RowError]:
        """Token ids of each row, or why the row has none, in order."""
        results: list[PreferencePair | RowError | None] = [None] * len(rows)
        texts: list[str] = []
        templated: list[int] = []
        plain: list[int] = []
        rendered: dict[int, tuple[str, str, str]] = {}
        for i, row in enumerate(rows):
            try:
                rendered[i] = self._texts(row)
            except RowError as error:
                results[i] = error
                continue
            (plain if row.rendered or not self.uses_template else templated).append(i)
        for group, is_plain in ((templated, False), (plain, True)):
            texts = [text for i in group for text in rendered[i]]
            ids = self._tokenize(texts, add_special_tokens=is_plain) if texts else []
            for at, i in enumerate(group):
                results[i] = self._cut(rows[i], *ids[3 * at : 3 * at + 3])
        assert all(result is not None for result in results)
        return [result for result in results if result is not None]

    def _texts(self, row: PreferenceRow) -> tuple[str, str, str]:
        """(prompt, prompt + chosen, prompt + rejected) as the model reads them, without the final EOS."""
        if row.rendered or not self.uses_template:
            if not (isinstance(row.prompt, str) and isinstance(row.chosen, str) and isinstance(row.rejected, str)):
                raise InputError(
                    f"{row.record.place}: the row holds chat messages, and the tokenizer has no chat template; "
                    "give one with data.chat_template=FILE"
                )
            return row.prompt, row.prompt + row.chosen, row.prompt + row.rejected
        prompt = _messages(row.prompt, "user")
        if prompt[-1]["role"] == "assistant":
            raise RowError(row.record, "prompt ends with the assistant", "the prompt's last turn is the assistant's")
        try:
            return (
                self._render(prompt, add_generation_prompt=True),
                self._render(prompt + _messages(row.chosen, "assistant")),
                self._render(prompt + _messages(row.rejected, "assistant")),
            )
        except TemplateError as error:
            raise RowError(row.record, "refused by the template", f"the chat template refuses it: {error}") from None

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert isinstance(text, str)
        return text

    def _tokenize(self, texts: list[str], add_special_tokens: bool) -> list[Ids]:
        """Ids without a doubled BOS (the text may hold its own) and without an EOS that the tokenizer appends."""
        # verbose=False: lengths are checked against the window later; the tokenizer's own warning would confuse.
        encoded = self.tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        if not add_special_tokens:
            return encoded
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        cleaned = []
        for text, ids in zip(texts, encoded, strict=True):
            if bos is not None and ids[:2] == [bos, bos]:
                ids = ids[1:]
            if ids and ids[-1] == eos and len(ids) > 1 and not text.endswith(self.tokenizer.eos_token):
                ids = ids[:-1]
            cleaned.append(ids)
        return cleaned

    def _cut(self, row: PreferenceRow, prompt: Ids, with_chosen: Ids, with_rejected: Ids) -> PreferencePair | RowError:
        """Cut both sequences at the end of the prompt, or where all three still agree if a token spans the boundary."""
        cut = min(common_prefix_length(prompt, with_chosen), common_prefix_length(prompt, with_rejected))
        if cut == 0:
            return RowError(row.record, "no prompt token", "no token of the prompt survives next to its responses")
        chosen, rejected = self._end(with_chosen[cut:]), self._end(with_rejected[cut:])
        if chosen == rejected:
            return RowError(row.record, "chosen = rejected", "'chosen' and 'rejected' have the same tokens")
        return PreferencePair(prompt[:cut], chosen, rejected, merged=cut < len(prompt))

    def _end(self, response: Ids) -> Ids:
        """`response` ended by one end-of-turn token: the template's own, else EOS.

        What a template puts after the end of the turn (ChatML's newline) is no part of the response: generation has
        stopped by then.
        """
        last = len(response)
        while last > 0 and response[last - 1] not in self._special_ids:
            last -= 1
        tail = response[last:]
        if last > 0 and not self.tokenizer.decode(tail).strip():
            return response[:last]
        return [*response, self.tokenizer.eos_token_id]


def _messages(content: Content, role: str) -> list[Message]:
    return [{"role": role, "content": content}] if isinstance(content, str) else content
