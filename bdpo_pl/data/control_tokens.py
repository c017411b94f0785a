"""Tokenisation in which a text that merely spells a control token never becomes one.

A chat template writes control tokens (`<|im_end|>`) as text, and the tokenizer reads them back. A message that spells
one would close its turn and open another in someone else's name. Therefore a control token that a message spells is
replaced by a placeholder before the template is rendered. Afterwards the template's own control tokens get a private
spelling, which only a copy of the tokenizer recognises, and the placeholders become the text again, which that copy
does not take for a control token. A conversation that spells no control token is rendered and tokenised unchanged.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from tokenizers import Tokenizer

from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.data.words import Words, added_around, cuts_before_words
from bdpo_pl.errors import InputError

Ids = list[int]

_MANY = 256
"""Number of texts from which encoding them word by word pays off."""

# No author of a data set can guess it; the ids do not depend on it.
_NONCE = secrets.token_hex(8)
_IN_BARS = re.compile(r"<([|｜]).+\1>")
_PLACEHOLDER = re.compile(f"zq{_NONCE}k(\\d+)zq")


@dataclass
class Spelled:
    """Control tokens that the messages of one conversation spell, by the number in their placeholder."""

    texts: list[str] = field(default_factory=list)

    def placeholder(self, text: str) -> str:
        """Return the placeholder of `text` while the template is rendered."""
        self.texts.append(text)
        return f"zq{_NONCE}k{len(self.texts) - 1}zq"

    def restore(self, text: str) -> str:
        """Return `text` with each placeholder replaced by the text that a message spelled."""
        return _PLACEHOLDER.sub(lambda match: self.texts[int(match[1])], text) if self.texts else text

    def __bool__(self) -> bool:
        return bool(self.texts)


class ControlTokens:
    """A tokenizer of texts that keeps spelled control tokens as text and recognises those that a template wrote.

    Args:
        tokenizer: tokenizer of the model.
        markers: added tokens that are not special although the chat template opens or closes turns with them.
        written: added tokens that are not special and that only the model may write (`<tool_call>`). Those that look
            like control tokens (`<|fim_prefix|>`) are always among them.
    """

    def __init__(self, tokenizer: TokenizerLike, markers: Iterable[str] = (), written: Iterable[str] = ()) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.special: dict[str, int] = {token.content: i for i, token in added.items() if token.special}
        for name in (tokenizer.bos_token, tokenizer.eos_token):
            if name is not None:
                self.special.setdefault(name, tokenizer.convert_tokens_to_ids(name))
        self.ids: dict[str, int] = dict(self.special)
        self.ids |= {token.content: i for i, token in added.items() if token.content in set(markers)}
        self._said_by_model = _any_of(self.ids)
        by_model = {*written, *(token.content for token in added.values() if _IN_BARS.fullmatch(token.content))}
        self.ids |= {token.content: i for i, token in added.items() if token.content in by_model}
        self._pattern = _any_of(self.ids)
        # Searching for two characters is much faster than the regular expression, and few texts contain them.
        self._beginnings = sorted({name[:2] for name in self.ids})
        self._backend = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        if self._backend is not None:
            # As the tokenizer itself does when it is called without either.
            self._backend.no_padding()
            self._backend.no_truncation()

    def protect(self, value: object, spelled: Spelled, *, by_model: bool = False) -> Any:
        """Return `value` (texts in lists and mappings) with placeholders where a text spells a control token.

        Args:
            value: variable with which a template is rendered.
            spelled: record of the spelled control tokens, which is extended.
            by_model: true for the model's own words, which may call tools.
        """
        if isinstance(value, str):
            if not any(beginning in value for beginning in self._beginnings):
                return value
            pattern = self._said_by_model if by_model else self._pattern
            return pattern.sub(lambda match: spelled.placeholder(match[0]), value)
        if isinstance(value, Mapping):
            # A template may write a mapping as JSON, with its keys.
            return {
                self.protect(key, spelled, by_model=by_model) if isinstance(key, str) else key: self.protect(
                    item, spelled, by_model=by_model
                )
                for key, item in value.items()
            }
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return [self.protect(item, spelled, by_model=by_model) for item in value]
        return value

    def encode(
        self, texts: Sequence[str], spelled: Sequence[Spelled | None] | None = None, *, add_special_tokens: bool = False
    ) -> list[Ids]:
        """Return the token ids of `texts`.

        Args:
            texts: rendered conversations.
            spelled: control tokens that the messages of each text spelled (None or empty: none).
            add_special_tokens: add the tokens that the tokenizer puts around a text.
        """
        if not texts:
            return []
        marked = [i for i, found in enumerate(spelled or ()) if found]
        if not marked:
            return self._encode(list(texts), add_special_tokens)
        assert spelled is not None
        ids: list[Ids] = [[]] * len(texts)
        plain = sorted(set(range(len(texts))) - set(marked))
        for i, row in zip(plain, self._encode([texts[i] for i in plain], add_special_tokens), strict=True):
            ids[i] = row
        private = [self.private(texts[i], spelled[i]) for i in marked]
        encodings = self._private_backend.encode_batch(private, add_special_tokens=add_special_tokens)
        for i, encoding in zip(marked, encodings, strict=True):
            ids[i] = encoding.ids
        return ids

    def splits_at(self, name: str) -> bool:
        """Return true if the tokenizer reads the text on the two sides of a control token independently.

        Texts with a common beginning can then share its encoding: it is encoded once.
        """
        token = next((t for t in self.tokenizer.added_tokens_decoder.values() if t.content == name), None)
        if self._backend is None or token is None or token.normalized:
            return False
        if token.lstrip or token.rstrip or token.single_word:
            return False
        for before, after in (("a b\n", " c\n"), ("a ", "b"), ("\n\n", "\n\n x"), (f" {name}", name)):
            whole, first, second = self._encode([before + name + after, before, name + after], False)
            if whole != first + second:
                return False
        return True

    def encode_with_ends(self, text: str, spelled: Spelled | None) -> tuple[Ids, list[int]]:
        """Return the token ids of one text without any around it, and where each ends in `private(text, spelled)`.

        Raises:
            InputError: the tokenizer is not a fast one, so it does not report positions.
        """
        if self._backend is None:
            raise InputError(self._too_slow("cut a conversation into turns"))
        backend = self._private_backend if spelled else self._backend
        # Post-processors add tokens around a text, and some exclude blanks from a token's range.
        processor = backend.post_processor
        backend.post_processor = None
        try:
            encoding = backend.encode(self.private(text, spelled), add_special_tokens=False)
        finally:
            backend.post_processor = processor
        return encoding.ids, [end for _, end in encoding.offsets]

    def private(self, text: str, spelled: Spelled | None) -> str:
        """Return `text` in the spelling of the tokenizer's copy, or `text` itself if nothing is spelled."""
        if not spelled:
            return text
        return spelled.restore(self._pattern.sub(lambda match: _private(self.ids[match[0]]), text))

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[Ids]:
        if len(texts) < _MANY or self._words is None or (add_special_tokens and self._around is None):
            return self._encode_whole(texts, add_special_tokens)
        ids = self._words.encode(texts)
        before, after = self._around if add_special_tokens and self._around else ([], [])
        return [[*before, *row, *after] for row in ids] if before or after else ids

    @cached_property
    def _words(self) -> Words | None:
        """Word-wise encoder, if the tokenizer gives the same ids word by word."""
        if self._backend is None or not cuts_before_words(self._backend):
            return None
        return Words(partial(self._encode_whole, add_special_tokens=False))

    @cached_property
    def _around(self) -> tuple[Ids, Ids] | None:
        return added_around(self._encode_whole)

    def _encode_whole(self, texts: list[str], add_special_tokens: bool) -> list[Ids]:
        if not texts:
            return []
        if self._backend is None:
            # verbose=False: lengths are checked against the window later; the tokenizer's own warning would confuse.
            return list(self.tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
        self._backend.encode_special_tokens = False
        try:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            broken = next((text for text in texts if not _is_unicode(text)), None)
            if broken is None:
                raise
            shown = broken.encode("ascii", "backslashreplace").decode()
            raise InputError(
                f"a text holds half of a surrogate pair, which cannot be tokenised: {shown:.60}; correct or remove it"
            ) from None
        return [encoding.ids for encoding in encodings]

    @cached_property
    def _private_backend(self) -> Tokenizer:
        """Copy of the tokenizer with another spelling of every control token."""
        if self._backend is None:
            raise InputError(self._too_slow("read a control token that a text spells as text"))
        state = json.loads(self._backend.to_str())
        names = {name: _private(i) for name, i in self.ids.items()}
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") is not None:
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        backend = Tokenizer.from_str(json.dumps(state))
        if any(backend.token_to_id(new) != self.ids[old] for old, new in names.items()):
            raise InputError(self._too_slow("read a control token that a text spells as text"))
        return backend

    def _too_slow(self, what: str) -> str:
        return (
            f"the tokenizer {self.tokenizer.name_or_path!r} ({type(self.tokenizer).__name__}) cannot {what}; give one "
            "with a tokenizer.json (data.tokenizer), or leave such rows out"
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _private(token: int) -> str:
    return f"<{_NONCE}{token}>"


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    # Longer ones first: a token takes precedence over a shorter one with which it begins.
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)")
