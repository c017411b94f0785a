"""LD-DPO: tokens beyond the shorter response's length count less, in the policy and in the reference."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from makers import build_model, preference_rows, write_jsonl
from training import fit, weights

from bdpo_pl.data.batches import PairDataset
from bdpo_pl.data.packing import RowLayout, parts_of
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.errors import InputError
from bdpo_pl.losses import (
    AdaDPOLoss,
    BalancedDPOLoss,
    BalancedLoss,
    DPOLoss,
    HingeLoss,
    LDLoss,
    PairScores,
    SFTLoss,
    WeightedSum,
    WPOLoss,
)
from bdpo_pl.scoring.scores import split_scores
from bdpo_pl.scoring.scoring_pass import score_pairs
from bdpo_pl.training.steps import pair_scores, plain_losses

PAIRS = [
    PreferencePair([5, 6, 7], [8, 9, 10, 11, 12], [13, 14]),
    PreferencePair([15], [16, 17], [18, 19, 20, 21, 22, 23]),
    PreferencePair([24, 25], [26, 27, 28], [29, 30, 31]),
    PreferencePair([5, 6], [7, 8, 9, 10], [11, 12, 13], chosen_trained=(True, False, True, True)),
]
TABLE = PairTable.from_pairs(PAIRS, [3])
SHORTER = [2, 2, 3, 3]


def token_logps(model, pair, side):
    """Of the trained tokens, one forward pass for each response."""
    response = (pair.chosen_ids, pair.rejected_ids)[side]
    trained = (pair.chosen_trained, pair.rejected_trained)[side] or [True] * len(response)
    ids = torch.tensor([[*pair.prompt_ids, *response]])
    logps = model(ids).logits[0, len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
    found = logps.gather(1, torch.tensor(response)[:, None]).squeeze(1)
    return found[torch.tensor(trained)]


def weighted(model, alpha):
    """(2, B) by hand."""
    sides = [
        [
            (tokens := token_logps(model, pair, side))[:shorter].sum() + alpha * tokens[shorter:].sum()
            for pair, shorter in zip(PAIRS, SHORTER, strict=True)
        ]
        for side in range(2)
    ]
    return torch.stack([torch.stack(side) for side in sides])


def batch_of(layout):
    return PairDataset(TABLE, 0, layout).collate([(i, 0.25) for i in range(4)])


@pytest.mark.parametrize("layout", RowLayout)
def test_sequences_are_taken_apart_at_the_shorter_length(layout):
    batch = batch_of(layout)
    parts = parts_of(batch.sequences, batch.lengths.min(0).values.repeat(2))
    assert parts.num_sequences == 16
    counts = torch.bincount(parts.sequence_ids, minlength=16).tolist()
    assert counts == [2, 2, 3, 3, 2, 2, 3, 3, 3, 0, 0, 0, 0, 4, 0, 0]
    assert parts.scored_lengths == tuple(counts)


@pytest.mark.parametrize("layout", [RowLayout.SPLIT, RowLayout.SHARED])
@pytest.mark.parametrize("loss", [DPOLoss(0.5), HingeLoss(0.5), BalancedDPOLoss(0.5, tau=0.7)])
def test_values_and_gradients_are_those_by_hand(layout, loss):
    model, reference = build_model(), build_model(hidden_size=16)
    scores = score_pairs(reference, TABLE, range(4), first=True)
    with torch.no_grad():
        expected_first = weighted(reference, 0.0)
        expected_reference = weighted(reference, 0.3)
    torch.testing.assert_close(torch.from_numpy(scores.first), expected_first, rtol=1e-5, atol=1e-4)
    known = split_scores(scores, TABLE, "pmi", 0.3)
    torch.testing.assert_close(known.reference, expected_reference, rtol=1e-5, atol=1e-4)
    batch = batch_of(layout)
    facts = pair_scores(batch, known, None)
    logps, losses, total = plain_losses(model, LDLoss(loss, 0.3), batch, facts)
    by_hand = weighted(model, 0.3)
    torch.testing.assert_close(logps, by_hand, rtol=1e-5, atol=1e-4)
    expected = loss(*by_hand, facts)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    grads, own = (torch.autograd.grad(value, list(model.parameters())) for value in (total, expected.mean()))
    for grad, other in zip(grads, own, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-5)


def test_values_and_gradients_are_trls():
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    pairs = PAIRS[:3]
    table, model = PairTable.from_pairs(pairs, [3]), build_model()
    batch = PairDataset(table, 0, RowLayout.SHARED).collate([(i, 1 / 3) for i in range(3)])
    reference = -10 * torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    sequences = [[*p.prompt_ids, *(p.chosen_ids, p.rejected_ids)[side]] for side in range(2) for p in pairs]
    longest = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sequences])
    starts = torch.tensor([len(p.prompt_ids) for p in pairs] * 2)[:, None]
    ends = torch.tensor([len(s) for s in sequences])[:, None]
    mask = (torch.arange(longest) >= starts) & (torch.arange(longest) < ends)
    logps = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2) * mask[:, 1:]

    def answer(**_):
        return SimpleNamespace(log_probs=logps, entropy=logps, mean_logits=logps, is_top1=mask[:, 1:])

    trainer = object.__new__(dpo_trainer.DPOTrainer)
    same = lambda tensor: tensor  # noqa: E731
    attributes = {
        "accelerator": SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same), "aux_loss_enabled": False,
        "model": SimpleNamespace(training=True), "ld_alpha": 0.4, "precompute_ref_logps": True, "beta": 0.3,
        "f_divergence_type": "reverse_kl", "loss_weights": [1.0], "loss_types": ["sigmoid"], "label_smoothing": 0.0,
        "use_weighting": False, "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1,
    }  # fmt: skip
    for name, value in attributes.items():
        setattr(trainer, name, value)
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(longest) < ends).long(), "completion_mask": mask.long(),
              "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}  # fmt: skip
    expected = trainer._compute_loss(answer, inputs, return_outputs=False)
    facts = pair_scores(batch, SimpleNamespace(reference=reference, comprehension=None), None)
    ours = plain_losses(model, LDLoss(DPOLoss(0.3), 0.4), batch, facts)[2]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    grads, theirs = (torch.autograd.grad(value, list(model.parameters())) for value in (ours, expected))
    for grad, other in zip(grads, theirs, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-6)


def test_training_is_shared_or_apart_alike_live_or_precomputed_and_never_fused(job, tmp_path, caplog):
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(16))
    trainer = {"max_steps": 2, "val_check_interval": 2}
    make = {"loss": LDLoss(DPOLoss(), 0.4)}
    shared = fit(job("shared", trainer=dict(trainer), prefix_sharing="always", **make))
    assert "not fused: the loss weights the tokens of a response" in caplog.text
    assert shared.evaluations[0]["held_out/loss"] == pytest.approx(math.log(2), abs=1e-5)
    live = fit(job("live", trainer=dict(trainer), prefix_sharing="never", reference_mode="live", **make))
    for name, value in weights(shared).items():
        torch.testing.assert_close(value, weights(live)[name], rtol=1e-4, atol=1e-5, msg=name)
    with pytest.raises(InputError, match=r"lm_head is fused, but .* weights the tokens"):
        fit(job("fused", trainer=dict(trainer), lm_head="fused", **make))


@pytest.mark.parametrize("parts", [[DPOLoss(), HingeLoss()], [BalancedDPOLoss(tau=0.7), DPOLoss()]])
def test_a_sum_of_losses_of_log_ratios_has_its_tokens_weighted(parts):
    logps, known = torch.tensor([[-3.0, -4.0], [-5.0, -2.0]])
    scores = PairScores(*torch.tensor([[3, 2], [4, 5]]), -known, -logps, *torch.rand(2, 2))
    total = WeightedSum(parts, [0.5, 2.0])
    loss = LDLoss(total, 0.3)
    assert loss.tail_weight == 0.3
    assert torch.equal(loss(logps, known, scores), total(logps, known, scores))


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: LDLoss(DPOLoss(), 1.5), r"alpha must be in \[0, 1\]"),
        (lambda: LDLoss(AdaDPOLoss()), "more of the policy than its two log-ratios"),
        (lambda: LDLoss(DPOLoss(sft_weight=0.1)), "more of the policy than its two log-ratios"),
        (lambda: LDLoss(LDLoss(DPOLoss(), 0.5), 0.3), "around another LDLoss"),
        (lambda: LDLoss(WeightedSum([DPOLoss(sft_weight=0.1)])), "more of the policy than its two log-ratios"),
        (lambda: WeightedSum([LDLoss(DPOLoss()), SFTLoss()]), "cannot be combined with SFTLoss"),
        (lambda: WeightedSum([LDLoss(DPOLoss()), HingeLoss()]), "put one around them"),
        (lambda: BalancedLoss(LDLoss(DPOLoss())), "put one around them"),
        (lambda: WPOLoss(LDLoss(DPOLoss())), "use only one of them"),
    ],
)
def test_what_does_not_fit_is_refused(make, fault):
    with pytest.raises(InputError, match=fault):
        make()
