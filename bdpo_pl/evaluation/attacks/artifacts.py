"""Attack prompts that others published: JailbreakBench's artifacts (arXiv:2404.01318, MIT), read from a file.

An artifact (github.com/JailbreakBench/artifacts, `attack-artifacts/METHOD/TYPE/MODEL.json`) holds the prompts that one
attack found against one model. On another model they measure transfer.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Suite

NO_PROMPT = "without a prompt: the attack gave up"
REPEATED = "repeated text"


def read_artifact(path: str) -> Suite:
    """Read an artifact as a harmful suite, named after its attack and the model that it was made against.

    Raises:
        InputError: there is no such file, its format is different, or it has no prompt.
    """
    file = Path(path).expanduser()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"attacks.artifacts: {file} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise InputError(f"attacks.artifacts: {file} is not JSON; {_FORM}") from None
    try:
        parameters, rows = content["parameters"], content["jailbreaks"]
        name = "_".join(_word(parameters[key]) for key in ("method", "model"))
    except (KeyError, TypeError):
        raise InputError(f"attacks.artifacts: {file} has no 'parameters' and 'jailbreaks'; {_FORM}") from None
    if not isinstance(rows, list):
        raise InputError(f"attacks.artifacts: 'jailbreaks' of {file} is not a list; {_FORM}")
    prompts: list[EvaluationPrompt] = []
    dropped: Counter[str] = Counter()
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        place = f"{file}, jailbreak {number}"
        prompt = _prompt(row, place, name)
        if prompt is None or prompt.text in seen:
            dropped[NO_PROMPT if prompt is None else REPEATED] += 1
            continue
        seen.add(prompt.text)
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"attacks.artifacts: {file} holds no prompt; leave it out")
    return Suite(f"artifact+{name}", "harmful", prompts, str(file), dict(dropped))


_FORM = (
    "give a file of github.com/JailbreakBench/artifacts, such as attack-artifacts/PAIR/black_box/vicuna-13b-v1.5.json"
)


def _prompt(row: object, place: str, attack: str) -> EvaluationPrompt | None:
    """Return the prompt of a row; None if the attack gave none."""
    if not isinstance(row, dict):
        raise InputError(f"attacks.artifacts: {place} is not a mapping; {_FORM}")
    text, goal = row.get("prompt"), row.get("goal")
    if text is None:
        return None
    if not isinstance(goal, str) or not goal.strip() or not isinstance(text, str) or not text.strip():
        raise InputError(f"attacks.artifacts: {place} needs texts in 'goal' and 'prompt' (or null in 'prompt')")
    try:
        (text + goal).encode()
    except UnicodeEncodeError:
        raise InputError(f"attacks.artifacts: {place} holds half of a surrogate pair, which is not text") from None
    category = row.get("category")
    # The text as it was published: blanks at its ends are part of the attack.
    return EvaluationPrompt(text, goal, category if isinstance(category, str) else "", place, attack=attack)


def _word(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError("no text")
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in value.strip())
