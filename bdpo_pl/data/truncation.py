"""Treatment of pairs that are longer than the window."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.errors import InputError

TruncationMode = Literal["drop", "keep_start", "keep_end"]


@dataclass(frozen=True)
class Truncation:
    """The policy for pairs whose prompt and longer response exceed `max_length` tokens.

    `drop` leaves the pair out. `keep_start` and `keep_end` first shorten the prompt, from its end (the tokens that open
    the assistant's turn remain) or from its start (a leading BOS remains, unless the prompt holds that token again: it
    opens turns then), to no fewer than `max_prompt_length` tokens. If the pair still does not fit, the ends of the
    responses are cut off, which then have no EOS. A response never becomes empty. `keep_start` leaves out a long prompt
    in which the tokens that open the assistant's turn were not found.

    Of a single answer, only the answer itself counts: the answer to another prompt beside it is cut to what is left.

    Args:
        max_length: window in tokens, for prompt and response together.
        mode: treatment of longer pairs: `drop`, `keep_start` or `keep_end`.
        max_prompt_length: number of tokens that the prompt may always keep. Default: half the window.

    Raises:
        InputError: a length is out of range.
    """

    max_length: int
    mode: TruncationMode = "drop"
    max_prompt_length: int | None = None

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise InputError(f"data.max_length must be at least 2, one token of each side; got {self.max_length}")
        if self.max_prompt_length is not None and not 1 <= self.max_prompt_length < self.max_length:
            raise InputError(
                f"data.max_prompt_length must be in [1, max_length), got {self.max_prompt_length} "
                f"with max_length {self.max_length}"
            )

    def fits(self, pair: PreferencePair, single: bool = False) -> bool:
        """Return true if both sequences of `pair` (of a `single` answer, its own) fit into the window unchanged."""
        return len(pair.prompt_ids) + _longest(pair, single) <= self.max_length

    def loses_opening(self, pair: PreferencePair, single: bool = False) -> bool:
        """Return true if `keep_start` cannot keep what opens the assistant's turn, because it was not found."""
        return (
            self.mode == "keep_start" and pair.header is None and len(pair.prompt_ids) > self._prompt_room(pair, single)
        )

    def apply(self, pair: PreferencePair, bos_token_id: int | None, single: bool = False) -> PreferencePair | None:
        """Return `pair` cut to the window; None if the policy drops it or the cut leaves two equal responses.

        Args:
            pair: the pair; of a single answer, `rejected` answers another prompt.
            bos_token_id: id of the token that begins texts, if there is one.
            single: true for a single answer.
        """
        if self.fits(pair):
            return pair
        if self.mode == "drop" and not (single and self.fits(pair, single)):
            return None
        if self.loses_opening(pair, single):
            return None
        prompt = self._shorten(pair.prompt_ids, self._prompt_room(pair, single), bos_token_id, pair.header or 0)
        room = self.max_length - len(prompt)
        cut = replace(
            pair,
            prompt_ids=prompt,
            chosen_ids=pair.chosen_ids[:room],
            rejected_ids=pair.rejected_ids[:room],
            chosen_trained=None if pair.chosen_trained is None else pair.chosen_trained[:room],
            rejected_trained=None if pair.rejected_trained is None else pair.rejected_trained[:room],
        )
        if any(flags is not None and not any(flags) for flags in (cut.chosen_trained, cut.rejected_trained)):
            return None
        return None if cut.chosen_ids == cut.rejected_ids else cut

    def _prompt_room(self, pair: PreferencePair, single: bool) -> int:
        """Return the number of tokens that the prompt may keep."""
        return max(self.max_prompt_length or max(1, self.max_length // 2), self.max_length - _longest(pair, single))

    def _shorten(self, prompt: list[int], length: int, bos_token_id: int | None, header: int) -> list[int]:
        if len(prompt) <= length:
            return prompt
        if self.mode == "keep_start":
            # The tokens that open the assistant's turn stay: without them, the response would continue the user's.
            header = min(header, length)
            return prompt[: length - header] + (prompt[-header:] if header else [])
        if length > 1 and prompt[0] == bos_token_id and prompt.count(prompt[0]) == 1:
            return [prompt[0], *prompt[-(length - 1) :]]
        return prompt[-length:]


def _longest(pair: PreferencePair, single: bool) -> int:
    return len(pair.chosen_ids) if single else max(len(pair.chosen_ids), len(pair.rejected_ids))
