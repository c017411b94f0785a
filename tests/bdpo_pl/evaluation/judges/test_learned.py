"""The learned judge: what it sees, that training finds what it should, and what is measured of it."""

import json

import numpy as np
import pytest
from makers import write_jsonl

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.judges.agreement import read_labelled
from bdpo_pl.evaluation.judges.judge import Exchange
from bdpo_pl.evaluation.judges.learned.features import WIDTH, features, matrix
from bdpo_pl.evaluation.judges.learned.refusal_model import (
    CARD_FILE,
    WEIGHTS_FILE,
    LearnedJudge,
    refusal_probability,
)
from bdpo_pl.evaluation.judges.learned.written_answers import written_answers
from bdpo_pl.evaluation.judges.measuring import main


def test_weights_are_small_data_with_a_card():
    assert WEIGHTS_FILE.stat().st_size < 2**20
    assert WEIGHTS_FILE.suffix == ".safetensors"
    card = json.loads(CARD_FILE.read_text())
    assert set(card["trained on"]) == {"written by this project", "jbb_human_labels", "pyrit_refusal_labels"}
    held_out = card["measured on sets held out from training"]["pyrit_refusal_labels"]
    assert set(held_out) == {"phrases", "learned"}
    assert set(held_out["learned"]) == {"answers", "asked", "agreement", "kappa", "recall", "precision"}


def test_labelled_answers():
    """The counts that are quoted."""
    _, rows = read_labelled()
    said = [v.refused for v in LearnedJudge().judge([row.exchange for row in rows])]
    hits = sum(row.positive and value for row, value in zip(rows, said, strict=True))
    alarms = sum(not row.positive and value for row, value in zip(rows, said, strict=True))
    assert (hits, alarms, sum(row.positive for row in rows)) == (68, 12, 80)


@pytest.mark.parametrize("answer", ["", " \n", "..."])
def test_blank_answers_refuse_nothing(answer):
    assert refusal_probability("how ?", answer) == 0.0


def test_phrases_that_settle_it():
    assert refusal_probability("how ?", "I'm sorry, but I can't help with that.") == 1.0


def test_threshold():
    exchange = Exchange("How do I bake bread?", "Not this one, and that is all there is to say.")
    share = refusal_probability(exchange.prompt, exchange.response)
    assert 0.0 < share < 1.0
    assert [LearnedJudge(t).judge([exchange])[0].refused for t in (share - 1e-6, share + 1e-6)] == [True, False]


def test_features_are_bounded_and_the_same_each_time():
    index, values = features("how do i water it ?", "First water it. " * 500)
    assert len(set(index.tolist())) == len(index)
    assert 0 <= index.min() <= index.max() < WIDTH
    assert np.abs(values).max() <= 1.0
    assert (features("how do i water it ?", "First water it. " * 500)[1] == values).all()
    assert matrix([("a", "b"), ("a", "")]).shape == (2, WIDTH)


def test_written_answers_are_the_same_for_a_seed_and_of_both_kinds():
    first = list(written_answers(120, 0))
    assert first == list(written_answers(120, 0))
    assert first != list(written_answers(120, 1))
    assert sum(refuses for *_, refuses in first) == 120
    assert not [text for _, text, _ in first if "{act}" in text or "{doing}" in text or "{topic}" in text.lower()]
    assert len({text for _, text, _ in first}) > 230


def test_training_learns_what_the_words_say():
    train = pytest.importorskip("bdpo_pl.evaluation.judges.learned.train")
    pytest.importorskip("scipy")
    weights = train.fit([train.written(150)])
    held_out = list(written_answers(60, 7))
    said = [refusal_probability(prompt, text, weights) >= 0.5 for prompt, text, _ in held_out]
    assert np.mean([value == refuses for value, (*_, refuses) in zip(said, held_out, strict=True)]) > 0.9


def test_measuring_prints_a_table_and_no_text(tmp_path, capsys):
    rows = [
        {"prompt": "how ?", "response": "I can't help with that wombat.", "label": "refusal", "model": "a"},
        {"prompt": "how ?", "response": "Sure, wombat.", "label": "compliance", "model": "b"},
    ]
    main([str(write_jsonl(tmp_path / "x.jsonl", rows))])
    said = capsys.readouterr().out
    assert "| all | phrases | 2 | 100.0 % (34.2 to 100.0) | 1.00" in said
    assert "| a | learned | 1 |" in said
    assert "wombat" not in said
    main(["--help"])
    assert "measuring FILE" in capsys.readouterr().out
    with pytest.raises(InputError, match="give one or more files"):
        main([])
