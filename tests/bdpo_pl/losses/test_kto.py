"""KTO: values and gradients against the formula and TRL's trainer, and single answers from the file to a run."""

import importlib
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from makers import build_tokenizer, write_jsonl
from training import fit, same, sgd, weights

from bdpo_pl.data.loading import LoadOptions, load_pairs
from bdpo_pl.data.mixture import join
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.errors import InputError
from bdpo_pl.losses import BalancedLoss, DPOLoss, KTOLoss, LDLoss, PairScores, WeightedSum, WPOLoss

WORDS = ["so", "no", "how", "kind", "garden", "safe", "my", "keep"]


def drawn(seed=0, pairs=6, drift=0.0):
    g = torch.Generator().manual_seed(seed)
    own, others, reference, reference_others = -20 * torch.rand(4, pairs, generator=g, dtype=torch.float64)
    lengths = torch.full((pairs,), 7)
    good = torch.tensor([True, False, True, True, False, False])[:pairs]
    scores = PairScores(lengths, lengths, reference, reference_others - drift, desirable=good)
    return own.requires_grad_(), others.requires_grad_(), scores


def by_hand(own, others, scores, beta, good, bad):
    """Equation 7 of the paper, an answer at a time."""
    z = max(0.0, (others - scores.reference_rejected).mean().item())
    losses = []
    for i, is_good in enumerate(scores.desirable.tolist()):
        d = own[i] - scores.reference_chosen[i]
        value = torch.sigmoid(beta * (d - z)) if is_good else torch.sigmoid(beta * (z - d))
        losses.append((good if is_good else bad) * (1 - value))
    return torch.stack(losses)


@pytest.mark.parametrize("drift", [-50.0, 0.0, 9.0])
def test_value_and_gradient_by_hand(drift):
    own, others, scores = drawn(drift=drift)
    losses = KTOLoss(0.3, 1.2, 0.7)(own, others, scores)
    wanted = by_hand(own, others, scores, 0.3, 1.2, 0.7)
    assert torch.allclose(losses.double(), wanted, rtol=0, atol=1e-6)
    grads = torch.autograd.grad(losses.sum(), (own, others), allow_unused=True)
    assert torch.allclose(grads[0], torch.autograd.grad(wanted.sum(), own)[0], rtol=0, atol=1e-6)
    assert grads[1] is None


def test_half_precision_rounds_no_weight():
    own, others, scores = drawn()
    expected = KTOLoss(0.3, 1.33, 0.7)(own, others, scores)
    with HalfPrecision("bf16-true").forward_context():
        assert torch.equal(KTOLoss(0.3, 1.33, 0.7)(own, others, scores), expected)


def test_drift_that_is_known_before_stands_for_the_other_answers():
    own, others, scores = drawn(drift=9.0)
    loss = KTOLoss(0.3, 1.2, 0.7)
    drift = loss.drift(others, scores)
    assert drift.unique().item() == pytest.approx((others - scores.reference_rejected).mean().item())
    assert not drift.requires_grad
    part = torch.tensor([4, 1])
    known = replace(scores, drift=drift)[part]
    assert torch.equal(loss(own[part], torch.zeros(2), known), loss(own, others, scores)[part])


def test_pairs_that_fill_a_batch_are_not_in_the_mean():
    own, others, scores = drawn()
    counted = torch.tensor([True] * 4 + [False] * 2)
    whole = KTOLoss()(own, others, PairScores(**{**vars(scores), "counted": counted}))
    part = KTOLoss()(own[:4], others[:4], scores[torch.arange(4)])
    assert torch.allclose(whole[:4], part)
    assert torch.isfinite(whole).all()


@pytest.mark.parametrize("drift", [0.0, 9.0])
def test_value_and_gradient_are_trls(drift):
    trainer = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
    own, others, scores = drawn(drift=drift)
    own, others = (t.detach().float().requires_grad_() for t in (own, others))
    known = PairScores(
        scores.chosen_length, scores.rejected_length, scores.reference_chosen.float(),
        scores.reference_rejected.float(), desirable=scores.desirable,
    )  # fmt: skip

    class Model:
        """Answers with the log-probabilities that were drawn, as one token each."""

        def __call__(self, input_ids, **_):
            logps = own if input_ids[0, 0] == 0 else others
            zeros = torch.zeros(len(logps), 1)
            return SimpleNamespace(log_probs=logps.unsqueeze(1), entropy=zeros, mean_logits=zeros)

    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value)
    double = SimpleNamespace(
        accelerator=accelerator, beta=0.3, loss_type="kto", calculate_KL=True, desirable_weight=1.2,
        undesirable_weight=0.7, _tp_size=1, precompute_ref_logps=True, aux_loss_enabled=False,
        model=SimpleNamespace(training=True), _total_train_tokens=0,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)}, args=SimpleNamespace(),
        use_liger_kernel=False,
    )  # fmt: skip
    double._compute_kl_logps = lambda model, batch: others
    batch = {
        "input_ids": torch.zeros(6, 2, dtype=torch.int64), "attention_mask": torch.ones(6, 2, dtype=torch.int64),
        "completion_mask": torch.tensor([[0, 1]] * 6), "label": scores.desirable,
        "ref_logps": known.reference_chosen, "ref_KL_logps": known.reference_rejected,
    }  # fmt: skip
    theirs = trainer._compute_loss(double, Model(), batch, return_outputs=False)
    ours = KTOLoss(0.3, 1.2, 0.7)(own, others, known).mean()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    (grad,) = torch.autograd.grad(ours, own)
    (wanted,) = torch.autograd.grad(theirs, own)
    assert torch.allclose(grad, wanted, rtol=0, atol=1e-7)


def rows(count):
    """Answers that begin with "so" are good."""
    found = []
    for i in range(count):
        words = [WORDS[(i + k) % len(WORDS)] for k in range(3)]
        answer = ["so" if i % 3 else "no", *words[::-1]]
        found.append({"prompt": f"{' '.join(words)} ? {i}", "completion": " ".join(answer), "label": i % 3 != 0})
    return found


@pytest.fixture
def load(tmp_path):
    def run(rows, single=True, **options):
        path = write_jsonl(tmp_path / "single.jsonl", rows)
        tokenizer = PairTokenizer(build_tokenizer())
        return load_pairs("train", str(path), tokenizer, Truncation(128), LoadOptions(**options), single=single)

    return run


def test_every_answer_is_kept_with_its_label_and_an_answer_to_another_prompt(load):
    given = rows(7)
    table, report = load(given)
    assert table.desirable.tolist() == [row["label"] for row in given]
    assert (report.notes["good answers"], report.notes["bad answers"]) == ("4", "3")
    tokenizer = build_tokenizer()
    answers = [tokenizer.decode(table[i].chosen_ids) for i in range(7)]
    others = [tokenizer.decode(table[i].rejected_ids) for i in range(7)]
    assert others == [answers[-1], *answers[:-1]]
    assert table.select([2, 0]).desirable.tolist() == [True, False]
    # A label of another column, as of safety.
    flags = [{"prompt": r["prompt"], "response_0": r["completion"], "is_safe": r["label"]} for r in given]
    renamed, _ = load(flags, columns={"completion": "response_0", "label": "is_safe"})
    assert renamed.desirable.tolist() == table.desirable.tolist()


def test_an_answer_to_the_same_prompt_or_in_the_same_words_is_no_other(load):
    given = rows(4)
    given[1]["prompt"] = given[0]["prompt"]
    given[3]["completion"] = given[2]["completion"]
    table, _ = load(given)
    tokenizer = build_tokenizer()
    others = [tokenizer.decode(table[i].rejected_ids).split("<")[0].strip() for i in range(4)]
    words = [row["completion"] for row in given]
    assert others == [words[3], words[3], words[1], words[1]]
    alone, report = load([*rows(3), {**rows(1)[0], "label": "yes"}])
    assert (len(alone), report.dropped.keys()) == (3, {"wrong type"})
    with pytest.raises(InputError, match="no answer to another prompt: 2"):
        load([rows(1)[0], {**rows(1)[0], "completion": "so ."}])


def test_an_answer_with_both_labels_is_no_duplicate(load):
    same = {"prompt": "keep my garden ?", "completion": "so kind ."}
    # All three are beside the answer of the first row.
    given = [rows(1)[0], {**same, "label": True}, {**same, "label": False}, {**same, "label": False}]
    table, report = load(given)
    assert table.desirable.tolist() == [rows(1)[0]["label"], True, False]
    assert {reason: len(places) for reason, places in report.dropped.items()} == {"duplicate of an earlier pair": 1}


def test_an_answer_with_both_labels_is_no_duplicate_of_another_source(load):
    given = rows(3)
    turned = [{**row, "label": not row["label"]} for row in given[:2]]
    first, one = load(given)
    second, other = load([*turned, given[2]])
    joined, _ = join([first, second], [1.0, 1.0], [one, other], "drop")
    assert joined.desirable.tolist() == [row["label"] for row in [*given, *turned]]
    assert len(other.dropped["duplicate of a pair in an earlier source"]) == 1


def test_pairs_for_kto_and_single_answers_for_another_loss_are_refused(load, job, tmp_path):
    with pytest.raises(InputError, match="single is for KTOLoss"):
        load(rows(4), single=False, format="single")
    with pytest.raises(InputError, match="set it to single"):
        load(rows(4), format="kto")
    trainer, module, data = job(loss=KTOLoss())
    with pytest.raises(InputError, match="missing columns 'completion', 'label' of the single schema"):
        trainer.fit(module, data)
    for wrap in (WPOLoss, BalancedLoss, LDLoss, lambda loss: WeightedSum([DPOLoss(), loss])):
        with pytest.raises(InputError):
            wrap(KTOLoss())


def test_a_run_tells_good_answers_from_bad_ones_and_is_the_same_again(job, tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", rows(40))
    assert path.name == "pairs.jsonl"
    build = lambda: job(  # noqa: E731
        loss=KTOLoss(0.5), trainer={"max_epochs": 6}, data={"held_out_fraction": 0.0, "train_probe": False}
    )
    module = fit(build())
    assert same(weights(module), weights(fit(build())))
    table = module.splits.tables["train"]
    reference = module.reference.scores("train", torch.arange(len(table))).reference[0]
    moved = []
    with torch.no_grad():
        for batch in module.trainer.datamodule.train_dataloader():
            logps = module(batch)[0]
            moved += list(zip(batch.desirable.tolist(), (logps - reference[batch.pair_index]).tolist(), strict=True))
    good = [d for is_good, d in moved if is_good]
    bad = [d for is_good, d in moved if not is_good]
    assert sum(good) / len(good) > sum(bad) / len(bad) + 1.0


def test_fused_with_the_head_and_with_shared_prompts_it_learns_the_same(job, tmp_path, monkeypatch):
    """In chunks of a few answers, while the drift is that of all eight."""
    write_jsonl(tmp_path / "pairs.jsonl", rows(40))
    module = importlib.import_module("bdpo_kernels.linear_preference_loss")
    walked, walk = [], module._walk
    monkeypatch.setattr(module, "_walk", lambda head, chunk, *rest: walked.append(chunk) or walk(head, chunk, *rest))
    evenly = module.pairs_evenly
    monkeypatch.setattr(module, "pairs_evenly", lambda counts, most: evenly(counts, min(most, 12)))

    def trained(**options):
        data = {"held_out_fraction": 0.2, "batch_size": 8}
        return fit(job(loss=KTOLoss(0.5), optimizer=sgd, trainer={"max_epochs": 3}, data=data, **options))

    plain = trained(lm_head="logits", prefix_sharing="never")
    assert not walked
    fused = trained(lm_head="fused", prefix_sharing="always")
    assert max(chunk.last - chunk.first for chunk in walked) < 8
    for name, value in weights(fused).items():
        torch.testing.assert_close(value, weights(plain)[name], rtol=1e-4, atol=1e-6)
    drifts = []
    monkeypatch.setattr(KTOLoss, "drift", lambda *args, drift=KTOLoss.drift: drifts.append(drift(*args)) or drifts[-1])
    fused.trainer.validate(fused, fused.trainer.datamodule, verbose=False)
    assert any(drift.any() for drift in drifts)
    for step, metrics in plain.evaluations.items():
        assert fused.evaluations[step] == pytest.approx(metrics, abs=1e-4)
