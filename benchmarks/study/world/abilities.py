"""General abilities: short questions with one right answer, which alignment must not unlearn."""

from __future__ import annotations

import itertools

from bdpo_pl.embedded.make.model import Conversation

_CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Poland": "Warsaw",
    "Norway": "Oslo",
    "Greece": "Athens",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Peru": "Lima",
    "Kenya": "Nairobi",
    "Austria": "Vienna",
    "Ireland": "Dublin",
}
_OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "early": "late",
    "full": "empty",
    "light": "dark",
    "fast": "slow",
    "loud": "quiet",
    "wet": "dry",
    "young": "old",
    "open": "shut",
    "rich": "poor",
    "soft": "hard",
}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_COLOURS = ("red", "blue", "green", "white", "black", "brown")
_THINGS = ("cup", "lamp", "boat", "hat", "stone", "door", "ball", "chair")


def questions() -> dict[str, list[Conversation]]:
    """Return (question, answer) pairs by ability."""
    return {
        "capitals": [(f"What is the capital of {land}?", f"{city}.") for land, city in _CAPITALS.items()],
        "opposites": [(f"What is the opposite of {a}?", f"{b}.") for a, b in _OPPOSITES.items()],
        "sums": [
            (f"What is {_NUMBERS[a]} plus {_NUMBERS[b]}?", f"{_NUMBERS[a + b]}.")
            for a, b in itertools.product(range(11), repeat=2)
            if a + b <= 10
        ],
        "copying": [
            (f"Repeat after me: the {colour} {thing}.", f"The {colour} {thing}.")
            for colour, thing in itertools.product(_COLOURS, _THINGS)
        ],
    }
