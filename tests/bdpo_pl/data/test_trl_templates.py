"""The boundary over the chat templates that TRL ships: cut exactly, or refused by name."""

import importlib.util
import re
from pathlib import Path

import pytest
from chat_templates import tokenizer_for
from encoded_rows import SYSTEM, TURNS, USER, check, encode, say, trained
from jinja2 import UndefinedError

from bdpo_pl.data.rows import RowError

_trl = importlib.util.find_spec("trl")
_FOLDER = Path(_trl.origin if _trl and _trl.origin else "absent").parent / "chat_templates"
_needs_trl = pytest.mark.skipif(_trl is None, reason="TRL, whose chat templates these are, is not installed")


@_needs_trl
def test_every_template_of_trl_is_cut_exactly_or_refused_by_name():
    silent, refused, exact = [], {}, 0
    for path in sorted(_FOLDER.glob("*.jinja")):
        template = path.read_text(encoding="utf-8")
        tokenizer = tokenizer_for(template)
        for prompt in ([USER], [SYSTEM, USER], [USER, *say("why ?"), {"role": "user", "content": "slugs ."}]):
            pair, _ = encode(tokenizer, prompt, say("in the morning ."), say("i cannot help ."))
            if isinstance(pair, RowError):
                refused[path.stem] = pair.reason
                continue
            try:
                check(tokenizer, prompt, pair, "in the morning .", "i cannot help .")
                exact += 1
            except AssertionError as error:
                silent.append((path.stem, str(error)))
        several, _ = encode(tokenizer, [USER], TURNS, say("no ."))
        if not isinstance(several, RowError):
            learnt = tokenizer.decode(trained(several.chosen_ids, several.chosen_trained))
            if "slugs" in learnt or "why" not in learnt or "traps" not in learnt:
                silent.append((path.stem, learnt))
    assert not silent
    assert exact > 100
    assert set(refused.values()) <= {"the generation prompt opens a thought", "refused by the template"}, refused


@_needs_trl
def test_generation_marks_of_trls_templates_hold_every_token_that_is_trained_on():
    """The oracle: transformers' mask by the marks of TRL's own training templates, for a response of two answers.

    The marks hold more: line breaks and second markers behind an answer, and empty thoughts before it, none of which
    generation has to write. Words are trained on by both alike.
    """
    compared = []
    for path in sorted(_FOLDER.glob("*.jinja")):
        template = path.read_text(encoding="utf-8")
        tokenizer = tokenizer_for(template)
        pair, _ = encode(tokenizer, [USER], TURNS, say("no ."))
        if "generation" not in re.findall(r"{%-?\s*(\w+)\s*-?%}", template) or isinstance(pair, RowError):
            continue
        try:
            said = tokenizer.apply_chat_template([USER, *TURNS], return_dict=True, return_assistant_tokens_mask=True)
        except UndefinedError:
            continue  # a template for contents in parts alone, which transformers renders as they are
        ids = pair.prompt_ids + pair.chosen_ids
        if said["input_ids"][: len(ids)] != ids:
            continue  # the template writes a last answer otherwise than an earlier one
        ours = [False] * len(pair.prompt_ids) + list(pair.chosen_trained)
        theirs = [bool(flag) for flag in said["assistant_masks"]]
        assert all(theirs[k] for k, flag in enumerate(ours) if flag), path.stem
        ours += [False] * (len(theirs) - len(ours))
        more = [token for token, mine, flag in zip(said["input_ids"], ours, theirs, strict=True) if flag and not mine]
        assert not re.sub(r"</?think>", "", tokenizer.decode(more, skip_special_tokens=True)).strip(), path.stem
        compared.append(path.stem)
    assert len(compared) >= 20, compared
