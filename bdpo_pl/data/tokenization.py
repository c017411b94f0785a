"""Tokenisation of preference rows, with a prompt/response boundary that is proven for each row.

Prompt and response are always tokenised together and then cut, because separate tokenisation gives different tokens
wherever the tokenizer would have merged across the boundary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError

from bdpo_pl.data.boundary import Cutter, Response, Thoughts
from bdpo_pl.data.chat_template import Conversation, chat_encoder
from bdpo_pl.data.control_tokens import Ids, Spelled
from bdpo_pl.data.opening import opening_of
from bdpo_pl.data.pairs import PreferencePair, ReadAs, padding_id
from bdpo_pl.data.rows import Content, Message, PreferenceRow, RowError, check_size, common_prefix_length
from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.errors import InputError

__all__ = ["Ids", "PairTokenizer", "PreferencePair", "ReadAs", "SpelledControlTokens", "padding_id"]

SpelledControlTokens = Literal["auto", "text", "parse"]

_ASSISTANT_MARK = "\n\nAssistant:"


@dataclass
class _Texts:
    """The texts of a row: the prompt, each response behind it, and the end of the prompt that opens a turn."""

    prompt: str
    responses: tuple[Response, Response]
    spelled: Spelled | None
    templated: bool
    opening: str | None


class PairTokenizer:
    """A tokenizer of preference rows for one model.

    Args:
        tokenizer: transformers tokenizer with an EOS token.
        chat_template: `auto` renders with the tokenizer's template if it has one (a text prompt becomes the user's
            turn); `none` leaves texts unchanged; anything else is the path of a Jinja template file.
        null_prompt: the user's words in the null prompt x₀ against which comprehension is measured.
        template_kwargs: variables of the chat template for every row (`enable_thinking`, `date_string`, …).
        thoughts: treatment of thoughts in responses, as in `Cutter`.
        dialogues: treatment of rows with a whole dialogue as text: convert it to chat messages (`turns`), or keep it as
            `text`.
        control_tokens: treatment of a text that spells a control token: `text`, a control token (`parse`, only without
            a chat template), or `auto`: text with a chat template; without one, the row is refused.

    Raises:
        InputError: no EOS token, an unreadable template, or options that contradict each other.
    """

    def __init__(
        self,
        tokenizer: TokenizerLike,
        chat_template: str = "auto",
        null_prompt: str = "",
        template_kwargs: Mapping[str, Any] | None = None,
        thoughts: Thoughts = "train",
        dialogues: Literal["turns", "text"] = "turns",
        control_tokens: SpelledControlTokens = "auto",
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"tokenizer {tokenizer.name_or_path!r} has no EOS token, so a model cannot learn where a response "
                "ends; set eos_token in its tokenizer_config.json"
            )
        if not tokenizer("a b", add_special_tokens=False, verbose=False)["input_ids"]:
            raise InputError(
                f"tokenizer {tokenizer.name_or_path!r} gives no token for the text 'a b': the model's folder lacks its "
                "tokenizer's files (tokenizer.json or tokenizer.model); add them, or name a tokenizer (data.tokenizer)"
            )
        if chat_template not in ("auto", "none"):
            try:
                tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
            except OSError as error:
                raise InputError(f"data.chat_template: cannot read {chat_template} ({error.strerror})") from None
        self.tokenizer = tokenizer
        assert tokenizer.eos_token is not None
        self._eos, self._eos_text = tokenizer.eos_token_id, tokenizer.eos_token
        self.null_prompt = null_prompt
        self.uses_template = chat_template != "none" and bool(tokenizer.chat_template)
        if template_kwargs and not self.uses_template:
            raise InputError("data.chat_template_kwargs: there is no chat template that could read them; leave it out")
        if self.uses_template and control_tokens == "parse":
            raise InputError(
                "data.control_tokens: a chat template writes the control tokens itself, and texts cannot hold them "
                "too; set data.chat_template to none for texts that are rendered already"
            )
        self.encoder = chat_encoder(tokenizer, template_kwargs)
        self.thoughts = thoughts
        self.dialogues = dialogues
        self.control_tokens = control_tokens
        self.read_as = ReadAs()
        self._added: dict[str, Ids] = {}

    def null_prompt_ids(self, rendered: bool = False, template_kwargs: Mapping[str, Any] | None = None) -> Ids:
        """Return the token ids of the null prompt x₀, at least one.

        With a template, an empty user turn under the variables of rows; without one (or for rows that are read as plain
        text), the BOS token alone, or the EOS token for tokenizers without BOS.
        """
        if self.uses_template and not rendered:
            turns: list[Message] = [{"role": "user", "content": self.null_prompt}]
            return self.encoder.prompts([Conversation(turns, None, template_kwargs or {})])[0]
        ids = self._plain([self.null_prompt], [None])[0] if self.null_prompt else []
        bos = self.tokenizer.bos_token_id
        return ids or [bos if bos is not None else self._eos]

    def reads_as_text(self, row: PreferenceRow) -> bool:
        """Return true if `row` is read without the chat template."""
        return not self.uses_template or (row.rendered and (row.turns is None or self.dialogues == "text"))

    def encode(self, rows: Sequence[PreferenceRow]) -> list[PreferencePair | RowError]:
        """Return the token ids of each row, or the reason why it has none, in order."""
        results: list[PreferencePair | RowError | None] = [None] * len(rows)
        texts: dict[int, _Texts] = {}
        for i, row in enumerate(rows):
            try:
                check_size(row)
                texts[i] = self._plain_texts(row) if self.reads_as_text(row) else self._templated_texts(row)
            except RowError as error:
                results[i] = error
        for templated in (True, False):
            group = [i for i, found in texts.items() if found.templated is templated]
            ids = self._tokenize([texts[i] for i in group], templated)
            for i, found in zip(group, ids, strict=True):
                try:
                    results[i] = self._cut(rows[i], texts[i], *found)
                except RowError as error:
                    results[i] = error
        assert all(result is not None for result in results)
        return [result for result in results if result is not None]

    def _tokenize(self, group: list[_Texts], templated: bool) -> list[tuple[Ids, Ids, Ids]]:
        """Return the ids of the prompt and of each response behind it."""
        # Texts do not merge across a control token, so they are cut at one; those that spell one are encoded whole.
        starts = [self._last_turn(t.prompt) if templated and not t.spelled else 0 for t in group]
        flat: list[str] = []
        for texts, start in zip(group, starts, strict=True):
            flat += [texts.prompt[:start], texts.prompt[start:], *(r.text[start:] for r in texts.responses)]
        spelled = [texts.spelled for texts in group for _ in range(4)]
        if not templated:
            flat, spelled = [t for k, t in enumerate(flat) if k % 4], [s for k, s in enumerate(spelled) if k % 4]
            ids = self._plain(flat, spelled)
            return [(ids[k], ids[k + 1], ids[k + 2]) for k in range(0, len(ids), 3)]
        ids = self.encoder.control.encode(flat, spelled)
        return [
            (ids[k] + ids[k + 1], ids[k] + ids[k + 2], ids[k] + ids[k + 3])
            if starts[k // 4]
            else (ids[k + 1], ids[k + 2], ids[k + 3])
            for k in range(0, len(ids), 4)
        ]

    def _last_turn(self, prompt: str) -> int:
        """Return where the last of the control tokens that open the assistant's turn begins, or 0."""
        if self._opening is None:
            return 0
        return max(0, prompt.rfind(self._opening))

    @cached_property
    def _opening(self) -> str | None:
        facts = self.encoder.template.facts(Conversation([]))
        control = self.encoder.control
        names = [name for name in control.special if facts is not None and name in facts.after_user]
        name = max(names, key=lambda name: facts.after_user.rfind(name) if facts is not None else 0, default=None)
        return name if name is not None and control.splits_at(name) else None

    @cached_property
    def _cutter(self) -> Cutter:
        end = self.encoder.end_of_turn
        stops = {self._eos_text}
        if end is not None:
            stops.add(self.tokenizer.convert_ids_to_tokens(end))
        return Cutter(self.encoder.template, stops, self.thoughts)

    def _templated_texts(self, row: PreferenceRow) -> _Texts:
        """Return prompt and responses as the template writes them."""
        record = row.record
        source = row if row.turns is None else row.turns
        spelled = Spelled()
        prompt = Conversation(_messages(source.prompt, "user"), row.tools, row.template_kwargs)
        if prompt.messages[-1]["role"] == "assistant":
            raise RowError(record, "prompt ends with the assistant", "the prompt's last turn is the assistant's")
        protected, _ = self.encoder.protect(prompt, spelled)
        responses = []
        try:
            opened = self._cutter.prompt(record, protected)
            opening = opening_of(self.encoder.template, protected, opened)
            for content in (source.chosen, source.rejected):
                turns, _ = self.encoder.protect(Conversation(_messages(content, "assistant")), spelled)
                responses.append(self._cutter.response(record, protected, opened, list(turns.messages)))
        except TemplateError as error:
            raise RowError(record, "refused by the template", f"the chat template refuses it: {error}") from None
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            if isinstance(error, RowError):
                raise
            raise RowError(
                record, "refused by the template", f"the chat template fails on it ({type(error).__name__}: {error})"
            ) from None
        self.read_as.dialogues += row.turns is not None
        return _Texts(opened, (responses[0], responses[1]), spelled, True, opening)

    def _plain_texts(self, row: PreferenceRow) -> _Texts:
        """Return prompt and responses unchanged, without the final EOS."""
        record = row.record
        if not (isinstance(row.prompt, str) and isinstance(row.chosen, str) and isinstance(row.rejected, str)):
            raise InputError(
                f"{record.place}: the row holds chat messages, and the tokenizer has no chat template; "
                "give one with data.chat_template=FILE"
            )
        if row.turns is not None and max(len(row.turns.chosen), len(row.turns.rejected)) > 1:
            raise RowError(
                record,
                "several turns in a plain text",
                "a response contains another turn of the user, and without a chat template the assistant's words "
                "cannot be separated from it; give a template (data.chat_template)",
            )
        spelled = Spelled()
        parts = [row.prompt, row.chosen, row.rejected]
        if self.control_tokens != "parse":
            parts = [self.encoder.control.protect(part, spelled) for part in parts]
        if spelled and self.control_tokens == "auto":
            raise RowError(
                record,
                "control token in a plain text",
                f"the text spells the control token {spelled.texts[0]!r}, and there is no chat template to say whether "
                "it is one: data.control_tokens=parse reads it as one (the texts are rendered already), "
                "data.control_tokens=text as text",
            )
        prompt, *answers = parts
        first, second = (
            Response(
                prompt + answer,
                len(prompt),
                [(len(prompt), len(prompt) + len(answer))],
                self.control_tokens == "parse" and answer.rstrip().endswith(self._eos_text),
            )
            for answer in answers
        )
        opening = _ASSISTANT_MARK if prompt.endswith(_ASSISTANT_MARK) else ""
        return _Texts(prompt, (first, second), spelled, False, opening)

    def _plain(self, texts: list[str], spelled: Sequence[Spelled | None]) -> list[Ids]:
        """Return ids with the tokens that the tokenizer adds around a text, but no doubled BOS and no added EOS."""
        control = self.encoder.control
        if self.control_tokens != "parse" and not any(spelled):
            found = [Spelled() for _ in texts]
            texts = [control.protect(text, s) for text, s in zip(texts, found, strict=True)]
            spelled = found
        bos, eos = self.tokenizer.bos_token_id, self._eos
        cleaned = []
        for text, ids in zip(texts, control.encode(texts, spelled, add_special_tokens=True), strict=True):
            if bos is not None and ids[:2] == [bos, bos]:
                ids = ids[1:]
            if ids and ids[-1] == eos and len(ids) > 1 and not text.endswith(self._eos_text):
                ids = ids[:-1]
            cleaned.append(ids)
        return cleaned

    def _cut(self, row: PreferenceRow, texts: _Texts, prompt: Ids, *wholes: Ids) -> PreferencePair:
        """Cut both sequences at the end of the prompt, or before the one token that spans the boundary.

        Raises:
            RowError: the prompt's tokens change with a response behind it, or both responses are the same.
        """
        sides = [
            self._rejoin(texts, prompt, response, ids) for response, ids in zip(texts.responses, wholes, strict=True)
        ]
        cut = min(common_prefix_length(prompt, ids) for ids in sides)
        if cut == 0:
            raise RowError(row.record, "no prompt token", "no token of the prompt survives next to its responses")
        if cut < len(prompt):
            for response, ids in zip(texts.responses, sides, strict=True):
                self._check_merged(row, texts, response, prompt, ids, cut)
        eos = [self._eos]
        chosen, rejected = (
            ids[cut:] if response.is_ended else [*ids[cut:], *eos]
            for response, ids in zip(texts.responses, sides, strict=True)
        )
        if chosen == rejected:
            raise RowError(row.record, "chosen = rejected", "'chosen' and 'rejected' have the same tokens")
        chosen_trained, rejected_trained = (
            self._trained(texts, response, ids, cut) for response, ids in zip(texts.responses, sides, strict=True)
        )
        self._count(row, texts)
        return PreferencePair(
            prompt[:cut],
            chosen,
            rejected,
            merged=cut < len(prompt),
            chosen_trained=chosen_trained,
            rejected_trained=rejected_trained,
            header=self._header(texts, prompt, cut),
        )

    def _rejoin(self, texts: _Texts, prompt: Ids, response: Response, whole: Ids) -> Ids:
        """Return `whole`, or the prompt's ids and the response's ids if the template's addition would merge the two."""
        if not response.added or whole[: len(prompt)] == prompt:
            return whole
        return prompt + self.encoder.control.encode([response.text[response.boundary :]], [texts.spelled])[0]

    def _check_merged(
        self, row: PreferenceRow, texts: _Texts, response: Response, prompt: Ids, whole: Ids, cut: int
    ) -> None:
        """Raise `RowError` unless the prompt's tokens end at the boundary, or with one token that spans it."""
        if whole[: len(prompt)] == prompt:
            return
        control = self.encoder.control
        boundary = len(control.private(response.text[: response.boundary], texts.spelled))
        ids, ends = control.encode_with_ends(response.text, texts.spelled)
        if ids[:1] != whole[:1]:
            ends = [0, *ends]  # a BOS token
        if 0 < cut < len(ends) and ends[cut - 1] <= boundary < ends[cut]:
            return
        raise RowError(
            row.record,
            "other prompt tokens with a response",
            "the tokenizer reads the prompt's last words differently if a response follows; begin the responses with a "
            "space or a new line, or end the prompt with one",
        )

    def _trained(self, texts: _Texts, response: Response, whole: Ids, cut: int) -> tuple[bool, ...] | None:
        """Return a flag for each token of the response: true if any of its characters is in a trained span."""
        if not response.is_masked:
            return None
        size = len(whole) - cut
        end = [] if response.is_ended else [True]
        added = self._added_ids(response.added)
        if len(response.spans) == 1 and added and whole[cut : cut + len(added)] == added:
            return (*([False] * len(added)), *([True] * (size - len(added))), *end)
        control = self.encoder.control
        prefix = len(control.encode([response.text[: response.boundary]], [texts.spelled])[0])
        ids, ends = control.encode_with_ends(response.text, texts.spelled)
        if ids != whole:  # rejoined: the ends are those of the two parts
            _, first = control.encode_with_ends(response.text[: response.boundary], texts.spelled)
            _, rest = control.encode_with_ends(response.text[response.boundary :], texts.spelled)
            offset = len(control.private(response.text[: response.boundary], texts.spelled))
            ends = first[:prefix] + [offset + end_ for end_ in rest]
        spans = [
            tuple(len(control.private(response.text[:place], texts.spelled)) for place in span)
            for span in response.spans
        ]
        trained: list[bool] = []
        start = ends[cut - 1]
        for place, stop in enumerate(ends[cut:], cut):
            # Of several tokens of one character (an emoji's), all end at its end, and only the first has a width.
            is_piece = stop == start and bool(trained) and whole[place - 1] not in self._added_tokens
            inside = any(first < stop and start < last for first, last in spans)
            trained.append(trained[-1] if is_piece else inside)
            start = stop
        return (*trained, *end)

    @cached_property
    def _added_tokens(self) -> frozenset[int]:
        return frozenset(self.tokenizer.added_tokens_decoder)

    def _added_ids(self, added: str) -> Ids:
        if added not in self._added:
            self._added[added] = self.encoder.control.encode([added])[0] if added else []
        return self._added[added]

    def _header(self, texts: _Texts, prompt: Ids, cut: int) -> int | None:
        """Return the number of final prompt tokens that open the assistant's turn; None if they are not found."""
        if texts.opening is None:
            return None
        return max(0, len(self._added_ids(texts.opening)) - (len(prompt) - cut))

    def _count(self, row: PreferenceRow, texts: _Texts) -> None:
        read = self.read_as
        read.templated += texts.templated
        read.plain += not texts.templated
        read.added |= {response.added for response in texts.responses if response.added}
        first, second = texts.responses
        read.count("control tokens spelled in a text, read as text", bool(texts.spelled))
        read.count("prompts that the template writes differently before an answer", first.moved or second.moved)
        read.count("responses with thoughts", first.has_thought or second.has_thought)
        read.count("responses of several turns", max(len(r.spans) for r in texts.responses) > 1)
        read.count("ended by EOS, the template ends no turn with a token", texts.templated and not first.is_ended)
        read.count("with tools", bool(row.tools))
        source = row if row.turns is None or not texts.templated else row.turns
        turns = source.prompt if isinstance(source.prompt, list) else []
        read.count("with a system message", any(m["role"] in ("system", "developer") for m in turns))
        read.count("prompts of several turns", any(m["role"] == "assistant" for m in turns))


def _messages(content: Content, role: str) -> list[Message]:
    return [{"role": role, "content": content}] if isinstance(content, str) else content
