"""A weight for each pair: from its column to the loss."""

import math

import pytest
import torch
from makers import build_model, build_tokenizer, preference_rows, write_jsonl
from training import fit, weights

from bdpo_pl.data.batches import PairDataset
from bdpo_pl.data.loading import LoadOptions, load_pairs
from bdpo_pl.data.mixture import join, repeat
from bdpo_pl.data.packing import RowLayout
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.errors import InputError
from bdpo_pl.losses import BalancedDPOLoss, DPOLoss, DrDPOLoss
from bdpo_pl.scoring.scores import SplitScores
from bdpo_pl.training.identity import describe_run
from bdpo_pl.training.steps import fused_losses, pair_scores, plain_losses

VALUES = [0.0, 1.0, 2.5, 0.25]


def rows_of(values):
    rows = preference_rows(len(values))
    return [row if value is ... else {**row, "weight": value} for row, value in zip(rows, values, strict=True)]


@pytest.fixture
def load(tmp_path):
    def loaded(values, name="rows.jsonl", **options):
        path = write_jsonl(tmp_path / name, rows_of(values) if values and not isinstance(values[0], dict) else values)
        return load_pairs("train", str(path), PairTokenizer(build_tokenizer()), Truncation(128), LoadOptions(**options))

    return loaded


def test_weights_are_read_counted_and_stay_with_their_pairs(load):
    table, report = load(VALUES)
    assert table.weights.tolist() == VALUES
    assert report.notes["weights of pairs: smallest / mean / largest"] == "0 / 0.938 / 2.5"
    assert report.notes["pairs of weight 0, which training does not learn from"] == "1"
    assert table.select([2, 0]).weights.tolist() == [2.5, 0.0]
    doubled, _ = load([*rows_of(VALUES), rows_of(VALUES)[1]])
    assert doubled.weights.tolist() == VALUES
    plain, plain_report = load([...] * 2, "plain.jsonl")
    assert plain.weights is None
    assert not any("weight" in note for note in plain_report.notes)
    others, other_report = load([{**row, "prompt": f"again {i}"} for i, row in enumerate(rows_of([...] * 2))])
    joined, each = join([table, others], [1.0, 2.0], [report, other_report], "drop")
    assert repeat(joined, each, 0).weights.tolist() == [*VALUES, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("value", [-0.5, 1e39, 10**400, math.nan, math.inf, None, True, "2"])
def test_what_is_no_weight_is_refused_with_its_row(load, value):
    with pytest.raises(
        InputError, match=r"rows\.jsonl, line 2: field 'weight' must be a number of at least 0 and within float32"
    ):
        load([1.0, value])


def test_rows_without_a_weight_among_others_are_refused_and_the_column_can_be_left_out(load):
    with pytest.raises(InputError, match=r"line 3: no 'weight', which other rows of the source have \(1 rows"):
        load([1.0, 2.0, ...])
    assert load([1.0, -2.0], ignore=["weight"])[0].weights is None


@pytest.mark.parametrize("compute", [plain_losses, fused_losses])
def test_loss_and_gradients_are_the_weighted_mean_of_single_pairs(load, compute):
    table, _ = load(VALUES)
    model = build_model()
    g = torch.Generator().manual_seed(0)
    reference = -30 * torch.rand(2, 4, generator=g)
    layout = RowLayout.SPLIT

    def step(indices, weight, how):
        batch = PairDataset(table, 0, layout).collate([(i, weight) for i in indices])
        scores = pair_scores(batch, SplitScores(reference=reference[:, indices]), None)
        return how(model, DPOLoss(), batch, scores)

    total = step([0, 1, 2, 3], 1 / 4, compute)[2]
    grads = torch.autograd.grad(total, list(model.parameters()))
    alone = [step([i], 1.0, plain_losses)[1].sum() for i in range(4)]
    mean = sum(value * loss for value, loss in zip(VALUES, alone, strict=True)) / 4
    torch.testing.assert_close(total, mean, rtol=1e-5, atol=1e-6, check_dtype=False)
    for grad, expected in zip(grads, torch.autograd.grad(mean, list(model.parameters())), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


def test_weights_reach_training_and_not_the_measures(job, tmp_path):
    def run(name, values, **options):
        write_jsonl(tmp_path / "pairs.jsonl", rows_of(values))
        return fit(job(name, trainer={"max_steps": 3, "val_check_interval": 3}, **options))

    g = torch.Generator().manual_seed(1)
    values = (3 * torch.rand(16, generator=g)).tolist()
    weighted = run("a", values, loss=BalancedDPOLoss(tau=0.5), lm_head="fused", prefix_sharing="always")
    logits = run("b", values, loss=BalancedDPOLoss(tau=0.5), lm_head="logits", prefix_sharing="never")
    plain = run("c", [...] * 16, loss=BalancedDPOLoss(tau=0.5))
    for name, value in weights(weighted).items():
        torch.testing.assert_close(value, weights(logits)[name], rtol=1e-4, atol=1e-5, msg=name)
    moved = [(weights(weighted)[name] - value).abs().max() for name, value in weights(plain).items()]
    assert max(moved) > 1e-4
    assert weighted.evaluations[0] == pytest.approx(plain.evaluations[0], abs=1e-5)
    traits = [describe_run(m.trainer, m, m.trainer.datamodule)["data"].value for m in (weighted, logits, plain)]
    assert traits[0] == traits[1] != traits[2]


def test_a_loss_that_mixes_pairs_refuses_weights(job, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", rows_of([1.0] * 8))
    with pytest.raises(InputError, match="the pairs have weights, and DrDPOLoss mixes the pairs"):
        fit(job(loss=DrDPOLoss()))
