"""Judges that are language models: each exchange is put to one, and its answer is read in the form it must have."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.chat.chat_model import ChatModel, Message
from bdpo_pl.evaluation.judges.judge import Exchange, Judge, Verdict

BLANK = Verdict(refused=False, unsafe=False, score=0.0)
"""On an answer with no text: it gives nothing of what was asked for, and refuses nothing; no model need be asked."""
_EXCERPT = 80


class AskingJudge(Judge):
    """Asks a chat model.

    Args:
        model: that is asked.
        facts: of the model, for reports: weights, endpoint.
        attempts: how often it is asked about one exchange, until its answer has the form.

    Attributes:
        reminder: said to the model when its answer had not the form; empty: it is asked the same again.
    """

    reminder = ""

    def __init__(self, model: ChatModel, facts: Mapping[str, str], attempts: int = 3) -> None:
        self.model = model
        self.attempts = attempts
        self._facts: Mapping[str, str] = {"model": model.name, **facts}
        self._notes: Counter[str] = Counter()

    @abstractmethod
    def conversation(self, exchange: Exchange) -> list[Message]:
        """What the model is asked."""

    @abstractmethod
    def parse(self, answer: str) -> Verdict | None:
        """The verdict in the model's answer; None if it has not the form."""

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """A verdict on each exchange, in order; those with a blank answer are not put to the model.

        Raises:
            InputError: the model cannot be reached, or does not answer in its form after all attempts.
        """
        verdicts: dict[int, Verdict] = {i: BLANK for i, e in enumerate(exchanges) if not e.response.strip()}
        self._notes["blank answers"] += len(verdicts)
        left = [i for i in range(len(exchanges)) if i not in verdicts]
        asked = {i: self.conversation(exchanges[i]) for i in left}
        for attempt in range(self.attempts):
            if not left:
                break
            if attempt:
                self._notes["asked again"] += len(left)
            answers = dict(zip(left, self.model.reply([asked[i] for i in left]), strict=True))
            for i, answer in answers.items():
                verdict = self.parse(answer)
                if verdict is not None:
                    verdicts[i] = verdict
                elif self.reminder:
                    asked[i] = [
                        *self.conversation(exchanges[i]),
                        {"role": "assistant", "content": answer},
                        {"role": "user", "content": self.reminder},
                    ]
            left = [i for i in left if i not in verdicts]
        if left:
            raise InputError(
                f"judge {self.name}: {self.model.name} did not answer in the form of this judge on {len(left)} of "
                f"{len(exchanges)} exchanges (asked {self.attempts} times each); the first time it said "
                f"{answers[left[0]][:_EXCERPT]!r}. Is it a model for judge {self.name}?"
            )
        return [verdicts[i] for i in range(len(exchanges))]

    def facts(self) -> Mapping[str, str]:
        """The model, and what it is asked."""
        return self._facts

    def notes(self) -> Mapping[str, int]:
        """Blank answers, and exchanges it had to be asked about again."""
        return +self._notes
