"""Margins and gaps from log-probabilities of a model alone, one response at a time."""

import math

import numpy as np
import pytest
import torch
from makers import build_model, build_tokenizer, large, preference_rows, write_jsonl
from scipy.stats import binomtest

from bdpo_pl.data.loading import LoadOptions
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.measures.overfitting import PairProbe, PairsOptions, overfitting


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    sizes = {"train": 9, "held_out": 5, "out_of_distribution": 4}
    return {
        split: str(write_jsonl(folder / f"{split}.jsonl", preference_rows(size, seed)))
        for seed, (split, size) in enumerate(sizes.items())
    }


@pytest.fixture(scope="module")
def models():
    return [large(build_model(), std).eval() for std in (0.1, 0.2)]


def probe(tokenizer, model, **options):
    return PairProbe(PairsOptions(**options), tokenizer, model.config)


def logp_alone(model, tokenizer, prompt, response):
    """log π(response and its end | prompt), by one plain forward pass in float64 at the end."""
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(turn, add_special_tokens=False)["input_ids"]
    whole = tokenizer(turn + response + "<|im_end|>\n", add_special_tokens=False)["input_ids"]
    end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
    whole = whole[:end]
    with torch.no_grad():
        logp = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    at = torch.arange(len(ids), len(whole))
    return logp[at - 1, torch.tensor(whole)[at]].sum().item()


def test_options_of_reading_are_for_all_sets_and_not_each_has_every_column(files, models, chat_tokenizer, tmp_path):
    rows = [{**row, "context": "a b"} for row in preference_rows(5)]
    given = {**files, "held_out": str(write_jsonl(tmp_path / "held_out.jsonl", rows))}
    found = probe(chat_tokenizer, models[0], **given, load=LoadOptions(ignore=["context"]))
    assert [len(table) for table in found.tables.values()] == [9, 5, 4]
    with pytest.raises(InputError, match=r"'contxt', and no row of .*train\.jsonl, .* did you mean 'context'"):
        probe(chat_tokenizer, models[0], **given, load=LoadOptions(ignore=["context", "contxt"]))


def test_margins_accuracies_drifts_and_gaps_by_hand(files, models, chat_tokenizer):
    found = probe(chat_tokenizer, models[0], **files)
    logps = [found.logps(model, "m", 0) for model in models]
    deltas = {}
    for seed, (split, size) in enumerate((("train", 9), ("held_out", 5), ("out_of_distribution", 4))):
        rows = preference_rows(size, seed)
        by_hand = [
            [
                [logp_alone(model, chat_tokenizer, row["prompt"], row[side]) for row in rows]
                for side in ("chosen", "rejected")
            ]
            for model in models
        ]
        for ours, hand in zip(logps, by_hand, strict=True):
            assert ours[split] == pytest.approx(np.array(hand), abs=2e-3)
        deltas[split] = np.array(by_hand[1]) - np.array(by_hand[0])
    result = overfitting(*logps)
    for split, (chosen, rejected) in deltas.items():
        margins = result.splits[split]
        assert margins.margin.value == pytest.approx((chosen - rejected).mean(), abs=5e-3)
        assert margins.accuracy.value == (chosen - rejected > 0).mean()
        assert (margins.drift_chosen, margins.drift_rejected) == pytest.approx(
            (chosen.mean(), rejected.mean()), abs=5e-3
        )
    train, other = (deltas[split][0] - deltas[split][1] for split in ("train", "held_out"))
    gap = result.margin_gaps["held_out"]
    assert gap.value == pytest.approx(train.mean() - other.mean(), abs=5e-3)
    half = 1.959964 * math.sqrt(train.var(ddof=1) / 9 + other.var(ddof=1) / 5)
    assert (gap.high - gap.value, gap.value - gap.low) == pytest.approx((half, half), abs=5e-3)
    assert result.accuracy_gaps["held_out"].value == pytest.approx((train > 0).mean() - (other > 0).mean())
    assert result.margin_gaps.keys() == result.accuracy_gaps.keys() == {"held_out", "out_of_distribution"}


def test_first_model_ties_with_itself_for_certain(files, models, chat_tokenizer):
    logps = probe(chat_tokenizer, models[0], **files).logps(models[0], "m", 0)
    result = overfitting(logps, logps)
    for margins in result.splits.values():
        assert (margins.margin.value, margins.margin.low, margins.margin.high) == (0.0, 0.0, 0.0)
        assert (margins.accuracy.value, margins.accuracy.low, margins.accuracy.high) == (0.5, 0.5, 0.5)
    assert result.margin_gaps["held_out"].value == 0.0


def test_rounding_is_no_preference_and_a_model_that_is_always_right_is_not_certain():
    first = {"train": np.zeros((2, 4))}
    margins = np.array([2.0, 5e-4, -5e-4, -1.0])
    assert overfitting(first, {"train": np.stack([margins, np.zeros(4)])}).splits["train"].accuracy.value == 0.5
    right = overfitting(first, {"train": np.stack([np.arange(1.0, 5.0), np.zeros(4)])}).splits["train"]
    assert right.accuracy.value == right.accuracy.high == 1.0
    assert right.accuracy.low == pytest.approx(1 / (1 + 1.959964**2 / 4), abs=1e-6)


def test_gap_of_pairs_learnt_by_heart():
    def logps(train, other):
        return {"train": np.stack([train, np.zeros(3)]), "held_out": np.stack([other, np.zeros(2)])}

    first = logps(np.zeros(3), np.zeros(2))
    result = overfitting(first, logps(np.array([5.0, 6.0, 7.0]), np.array([1.0, -1.0])))
    assert result.margin_gaps["held_out"].value == 6.0
    # Variances 1/3 and 2/2.
    half = 1.959964 * math.sqrt(1 / 3 + 1)
    assert result.margin_gaps["held_out"].low == pytest.approx(6.0 - half)
    assert result.accuracy_gaps["held_out"].value == 0.5
    assert overfitting({"held_out": first["held_out"]}, {"held_out": first["held_out"]}).margin_gaps == {}


@pytest.mark.parametrize("sizes", [(1, 1), (1, 3), (3, 1)])
def test_margin_of_one_pair_has_no_interval_and_no_gap_to_it_has_one(sizes):
    first = {split: np.zeros((2, size)) for split, size in zip(("train", "held_out"), sizes, strict=True)}
    result = overfitting(first, {split: rows + np.array([[2.0], [1.0]]) for split, rows in first.items()})
    for split, size in zip(first, sizes, strict=True):
        margin = result.splits[split].margin
        assert (margin.value, margin.bounded) == (1.0, size > 1)
    gap = result.margin_gaps["held_out"]
    assert (gap.value, gap.count, gap.bounded) == (0.0, sum(sizes), False)


def test_accuracy_gap_of_a_model_that_is_always_right_is_not_certain():
    first = {"train": np.zeros((2, 240)), "held_out": np.zeros((2, 40))}
    right = {split: np.stack([np.ones(rows.shape[1]), np.zeros(rows.shape[1])]) for split, rows in first.items()}
    gap = overfitting(first, right).accuracy_gaps["held_out"]
    # Newcombe: as far as Wilson's intervals of 240/240 and 40/40 reach down.
    expected = (0.0, -(1 - binomtest(240, 240).proportion_ci(method="wilson").low),
                1 - binomtest(40, 40).proportion_ci(method="wilson").low)  # fmt: skip
    assert (gap.value, gap.low, gap.high) == pytest.approx(expected, abs=1e-6)
    # The first model ties with itself for certain.
    alone = overfitting(first, first).accuracy_gaps["held_out"]
    assert (alone.value, alone.low, alone.high) == (0.0, 0.0, 0.0)


def test_draw_is_of_the_size_asked_for_the_same_each_time_and_told(files, models, chat_tokenizer):
    found = [probe(chat_tokenizer, models[0], train=files["train"], max_pairs=4, seed=seed) for seed in (1, 1, 2)]
    places = [one.tables["train"].places for one in found]
    assert places[0] == places[1] != places[2]
    assert len(places[0]) == 4
    assert [
        len(probe(chat_tokenizer, models[0], train=files["train"], max_pairs=n).tables["train"]) for n in (0, 99)
    ] == [9, 9]
    assert "not drawn (pairs.max_pairs)" in str(vars(found[0].reports[0]))


def test_window_is_the_models_if_it_has_less(tmp_path, chat_tokenizer):
    rows = [*preference_rows(3), {"prompt": "water " * 90, "chosen": "yes .", "rejected": "no ."}]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    narrow = build_model(max_position_embeddings=64)
    assert len(probe(chat_tokenizer, narrow, train=str(path)).tables["train"]) == 3
    assert len(probe(chat_tokenizer, build_model(), train=str(path)).tables["train"]) == 4


def test_columns_and_bad_rows_as_in_fit(tmp_path, models, chat_tokenizer):
    rows = [{"prompt": r["prompt"], "good": r["chosen"], "rejected": r["rejected"]} for r in preference_rows(4)]
    rows[1]["rejected"] = ""
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(InputError, match=r"pairs\.jsonl"):
        probe(chat_tokenizer, models[0], train=str(path))
    load = LoadOptions(columns={"chosen": "good"}, bad_rows="drop")
    assert len(probe(chat_tokenizer, models[0], train=str(path), load=load).tables["train"]) == 3


def test_model_that_reads_other_tokens_is_refused(files, models, chat_tokenizer):
    found = probe(chat_tokenizer, models[0], **files)
    found.check_reads_alike(build_tokenizer(), "same")
    other = build_tokenizer()
    other.chat_template = other.chat_template.replace("assistant", "model")
    for tokenizer in (other, build_tokenizer(vocab_size=300)):
        with pytest.raises(InputError, match="pairs: after has another tokenizer or chat template than the first"):
            found.check_reads_alike(tokenizer, "after")


@pytest.mark.parametrize("wrong", [{"max_pairs": -1}, {"max_length": 1}])
def test_numbers_out_of_range(wrong):
    with pytest.raises(InputError, match=r"pairs\.max_pairs must be at least 0 and pairs\.max_length at least 2"):
        PairsOptions(**wrong)


def test_embedded_pairs_by_name():
    sources = PairsOptions(train="embedded", out_of_distribution="mine.jsonl").sources()
    assert sources.keys() == {"train", "out_of_distribution"}
    assert sources["train"].endswith("train.jsonl")
    assert sources["out_of_distribution"] == "mine.jsonl"
    assert PairsOptions().sources() == {}
