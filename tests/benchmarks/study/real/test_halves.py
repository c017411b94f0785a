"""Balanced and imbalanced halves of real pairs: what is measured of the pairs, how they are matched, and a cell."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from makers import build_model, build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.study.real import halves, plan


def pool(number=300, seed=0):
    """Pairs whose imbalance goes with length, as it may in real ones."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=number)
    tokens = np.exp(rng.normal(3.0, 0.6, size=(2, number))).astype(int) + 2
    imbalance = rng.normal(size=number) * tokens[0]
    return halves.Pool(
        list(range(number)), imbalance.tolist(), tokens[0].tolist(), tokens[1].tolist(), difficulty.tolist()
    )


def test_matched_halves_differ_in_imbalance_and_in_nothing_else():
    found = pool()
    matched = halves.match(found)
    balanced, imbalanced = (set(places.tolist()) for places in matched)
    assert len(balanced) == len(imbalanced) == matched.shape[1] > 40
    order = np.argsort(np.abs(found.imbalance))
    assert balanced <= set(order[:100].tolist())
    assert imbalanced <= set(order[-100:].tolist())
    covariates = found.covariates()
    assert covariates.std(axis=0) == pytest.approx(1.0)
    assert (np.abs(covariates[matched[0]] - covariates[matched[1]]) <= halves.CALIPER).all()
    alike = halves.balance(found, matched)
    apart = [abs(alike[f"difference/{name}"]) for name in ("log chosen tokens", "log rejected tokens", "difficulty")]
    # Unmatched thirds are not alike: what the matching is for.
    assert max(apart) < abs(covariates[order[-100:], 0].mean() - covariates[order[:100], 0].mean()) / 4
    assert alike["size/imbalanced"] > 5 * alike["size/balanced"]


def test_the_halves_of_a_seed_are_partners():
    found = pool()
    matched = halves.match(found)
    rows = [f"row {i}\n" for i in range(300)]
    drawn = [halves.draw_half(rows, found, matched, half, 20, seed=3) for half in plan.HALVES]
    places = [[int(row.split()[1]) for row in half] for half in drawn]
    partner = dict(matched.T.tolist())
    assert [partner[place] for place in places[0]] == places[1]
    assert drawn[0] != halves.draw_half(rows, found, matched, "balanced", 20, seed=4)
    with pytest.raises(ValueError, match="larger than population"):
        halves.draw_half(rows, found, matched, "balanced", 101, seed=0)


def test_pairs_are_measured_as_plain_transformers_measures_them(tmp_path, monkeypatch):
    build_model().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    asked = "\n\nHuman: how do i keep snails ?\n\nAssistant:"
    rows = [
        json.dumps({"chosen": f"{asked} set traps .", "rejected": f"{asked} read the label and wait ."}) + "\n",
        # Both sides alike: no pair, and left out.
        json.dumps({"chosen": f"{asked} no .", "rejected": f"{asked} no ."}) + "\n",
        json.dumps({"chosen": f"{asked} water the plant in the evening .", "rejected": f"{asked} no ."}) + "\n",
    ]
    found = halves.cached_pool(rows, tmp_path / "model", tmp_path)
    assert found.row == [0, 2]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    template = tokenizer.apply_chat_template
    for at, row in enumerate(found.row):
        per_token, tokens = [], []
        for side in ("chosen", "rejected"):
            answer = json.loads(rows[row])[side].removeprefix(asked).strip()
            turns = [{"role": "user", "content": "how do i keep snails ?"}]
            prompt = template(turns, add_generation_prompt=True, return_dict=False)
            whole = template([*turns, {"role": "assistant", "content": answer}], return_dict=False)
            end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
            logp = model(torch.tensor([whole[:end]])).logits.double().log_softmax(-1)[0, :-1]
            taken = logp.gather(1, torch.tensor(whole[1:end]).unsqueeze(1)).squeeze(1)[len(prompt) - 1 :]
            per_token.append(taken.mean().item())
            tokens.append(len(taken))
        assert [found.chosen_tokens[at], found.rejected_tokens[at]] == tokens
        assert found.difficulty[at] == pytest.approx(per_token[1] - per_token[0], abs=1e-5)
    # A second process reads what the first has measured.
    monkeypatch.setattr(halves, "measure_pool", lambda rows, model: replace(found, row=[7]))
    assert halves.cached_pool(rows, tmp_path / "model", tmp_path) == found
    # Other rows, or another model, are measured.
    assert halves.cached_pool(rows[:2], tmp_path / "model", tmp_path).row == [7]
    build_model(vocab_size=401).save_pretrained(tmp_path / "model")
    assert halves.cached_pool(rows, tmp_path / "model", tmp_path).row == [7]


def test_cells_of_the_halves_come_last_and_have_keys_of_their_own():
    records = {
        cell.key: {"pairs": {"held_out/logp_accuracy": 0.5, "held_out/drift_chosen": 0.0}} for cell in plan.tuning()
    }
    cells = plan.all_cells(records)
    last = cells[-10:]
    assert all(isinstance(cell, plan.HalfCell) for cell in last)
    assert [(cell.seed, cell.half) for cell in last] == [(seed, half) for seed in plan.SEEDS for half in plan.HALVES]
    assert {cell.method for cell in last} == {"DPO"}
    assert len({cell.key for cell in cells}) == len(cells) == 1 + 24 + 30 + 10
    for cell in (cells[0], cells[1], last[0]):
        again = plan.cell_of(json.loads(json.dumps(vars(cell))))
        assert again == cell
        assert again.key == cell.key
    assert not last[0].asks_prompts
    assert last[0].held_out == "test"


def test_keys_of_what_is_recorded_stay():
    assert plan.reference().key == "dfc576e5e7718bfc"
