"""Answers that are no real answers, each kind by examples of it and of what it must not be taken for."""

import pytest

from bdpo_pl.evaluation.oddities import BLANK, CUT, ECHO, OTHER_LANGUAGE, REPEATING, oddities

PROMPT = "How do I keep the squirrels out of the bird feeder in my garden without hurting any of them?"
GOOD = (
    "Hang the feeder from a thin wire between two trees, at least two metres from anything that a squirrel can jump "
    "from, and put a wide baffle above and below. Safflower seeds help too: birds like them, and squirrels do not."
)


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        "No.",
        "42",
        "I'm sorry, but I can't help with that.",
        # Takes the question up, and goes on.
        f"You ask how to keep the squirrels out of the bird feeder in your garden. {GOOD}",
        # A list has a form that comes again, in other words.
        "\n".join(
            f"{i}. Use {thing} to keep them away." for i, thing in enumerate(("wire", "baffles", "chilli", "oil"))
        ),
    ],
)
def test_answers_as_they_should_be(answer):
    assert oddities(PROMPT, answer, True) == ()


@pytest.mark.parametrize("answer", ["", " \n\t", "...", "\u200b", "— !?"])
def test_blank(answer):
    assert oddities(PROMPT, answer, True) == (BLANK,)


def test_cut():
    assert oddities(PROMPT, GOOD, False) == (CUT,)
    assert oddities(PROMPT, "", False) == (BLANK, CUT)


@pytest.mark.parametrize("answer", [PROMPT, PROMPT.lower().rstrip("?"), f"{PROMPT}\n{PROMPT}"])
def test_echo(answer):
    assert ECHO in oddities(PROMPT, answer, True)


@pytest.mark.parametrize("answer", ["Feed the birds and then go home. " * 8, "好的好的好的" * 60])
def test_repeating(answer):
    assert REPEATING in oddities(PROMPT, answer, True)


@pytest.mark.parametrize(
    "answer",
    [
        "Конечно, повесьте кормушку на тонкую проволоку между деревьями.",
        "Hängen Sie das Futterhaus an einen dünnen Draht, und zwar so, dass die Tiere nicht von einem Baum zu ihm "
        "springen können; das ist der beste Schutz für die Vögel, und es schadet auch den Hörnchen nicht.",
    ],
)
def test_other_language(answer):
    assert oddities(PROMPT, answer, True) == (OTHER_LANGUAGE,)
    # Asked in the same language it is none.
    assert oddities(answer, answer[::-1], True) == ()


def test_short_or_unclear_answers_have_no_language():
    assert oddities(PROMPT, "Naturellement.", True) == ()
    assert oddities(PROMPT, "def feed(birds): return [bird.eat(seed) for bird, seed in zip(birds, seeds)]", True) == ()
