"""A resumed run is the run that it goes on from, or says what is different."""

import csv
import json
import logging
import re
import shutil
import signal

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from makers import CHATML, build_model, build_tokenizer, large, preference_rows, write_jsonl
from sharded_jobs import train
from stopped_ranks import SignalAt

from bdpo_pl.errors import InputError, StoppedError
from bdpo_pl.losses import (
    BalancedDPOLoss,
    BalancedLoss,
    DPOLoss,
    KTOLoss,
    SafeDPOLoss,
    SFTLoss,
    SimPOLoss,
    WeightedSum,
    WPOLoss,
)
from bdpo_pl.training.checkpoints import StopSignals
from bdpo_pl.training.identity import ResumeOptions, RunIdentity, check_resume
from bdpo_pl.training.metrics_file import MetricsRows, continue_metrics, step_first
from bdpo_pl.training.traits import Trait, loss_traits

ROWS = preference_rows(24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("identity")
    build_model().save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "pairs.jsonl", ROWS)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    write_jsonl(folder / "swapped.jsonl", swapped)
    write_jsonl(folder / "reversed.jsonl", ROWS[::-1])
    build_tokenizer(vocab_size=300).save_pretrained(folder / "tokenizer")
    (folder / "other.jinja").write_text(CHATML.replace("\n", " : "))
    large(build_model()).save_pretrained(folder / "reference")
    build_tokenizer().save_pretrained(folder / "reference")
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder):
    """Of a run that was stopped after 3 of its 6 steps, the last of its first epoch."""
    with pytest.raises(StoppedError, match="after 3 optimiser steps"):
        run(folder, "one", SignalAt(signal.SIGTERM, 0, 2))
    return folder / "one" / "checkpoints" / "last.ckpt"


def run(folder, name, *callbacks, ckpt_path=None, allow=(), **options):
    identity = RunIdentity(None if ckpt_path is None else str(ckpt_path), allow)
    options["trainer"] = {"log_every_n_steps": 1, **options.get("trainer", {})}
    return train(
        folder, name, callbacks=[StopSignals(), MetricsRows(), identity, *callbacks], ckpt_path=ckpt_path, **options
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pairs": "swapped.jsonl"}, r"data: 19 pairs of .*pairs\.jsonl \(sha256 \w+\) → 19 pairs of .*swapped\.jsonl"),
        ({"pairs": "reversed.jsonl"}, r"data: .*reversed\.jsonl.*resume\.allow '\[data\]'"),
        ({"data": {"tokenizer": "tokenizer"}}, r"data: .*tokenizer: .*resume\.allow '\[data, tokenizer\]'"),
        ({"data": {"chat_template": "other.jinja"}}, r"template: auto .* → .*other\.jinja"),
        ({"data": {"chat_template": "none"}}, r"template: auto .* → none"),
        ({"data": {"max_length": 40}}, r"data: "),
        ({"reference": "reference"}, r"reference: .*model in float32 .* → .*reference in float32"),
        (
            {"loss": WeightedSum([BalancedDPOLoss(), SimPOLoss()])},
            r"loss: \S+\.BalancedDPOLoss → \S+\.WeightedSum\(\S+\.BalancedDPOLoss, \S+\.SimPOLoss\)",
        ),
        ({"loss": SimPOLoss()}, r"loss: bdpo_pl\.losses\.\S+BalancedDPOLoss → bdpo_pl\.losses\.\S+SimPOLoss"),
        (
            {"optimizer": lambda params: torch.optim.SGD(params, lr=1e-3)},
            r"another optimiser \(optimizer: torch\.optim\.adamw\.AdamW → torch\.optim\.sgd\.SGD\)",
        ),
        ({"optimizer": lambda params: torch.optim.AdamW(params, lr=-1.0)}, "model.optimizer: Invalid learning rate"),
    ],
)
def test_another_run_is_refused_by_name_before_anything_is_scored(folder, checkpoint, monkeypatch, options, named):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("bdpo_pl.scoring.reference.score_table", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(InputError, match=named):
        run(folder, "one-other", ckpt_path=checkpoint, **options)


def test_reference_changed_in_place_is_refused(folder, checkpoint):
    weights = folder / "model" / "model.safetensors"
    before = weights.read_bytes()
    try:
        shutil.copy(folder / "reference" / "model.safetensors", weights)
        with pytest.raises(InputError, match="belongs to another run: reference: "):
            run(folder, "one-changed", ckpt_path=checkpoint)
    finally:
        weights.write_bytes(before)


def test_what_is_allowed_or_changes_the_order_or_takes_effect_is_said(folder, checkpoint, caplog):
    options = {
        "pairs": "swapped.jsonl",
        "allow": ["data"],
        "loss": BalancedDPOLoss(beta=5.0),
        "lr_schedule": "constant",
        "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, eps=1e-6),
        "data": {"batch_size": 4},
        "trainer": {"max_epochs": 3},
    }
    with caplog.at_level(logging.INFO):
        run(folder, "one-said", ckpt_path=checkpoint, **options)
    said = caplog.text
    for line in (
        "swapped.jsonl", "(allowed)", "loss.beta: 0.1 → 5.0 (takes effect", "lr_schedule: cosine → constant (takes",
        "optimizer.lr: 0.002 → 0.01 (takes effect", "max_epochs: 2 → 3 (takes effect",
        "batches: 8 pairs over all ranks, 1 to a step → 4 pairs over all ranks, 1 to a step (another order",
    ):  # fmt: skip
        assert line in said, line
    assert "weight_decay" not in said
    # A constant schedule at the new rate, from the first step on.
    with (folder / "one-said" / "metrics.csv").open() as file:
        rates = {float(row["train/lr"]) for row in csv.DictReader(file) if row["train/lr"]}
    assert sorted(rates) == [pytest.approx(1e-2)]


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"trainer": {"max_epochs": 3}}, None),
        ({"data": {"held_out": "other.jsonl"}, "allow": ["data"]}, "data, held-out data"),
        ({"loss": BalancedDPOLoss(beta=0.2)}, r"loss\.beta"),
        ({"trainer": {"limit_val_batches": 1}}, "limit_val_batches"),
    ],
)
def test_validations_of_something_else_are_no_before_of_those_that_follow(
    folder, checkpoint, caplog, monkeypatch, options, changed
):
    monkeypatch.chdir(folder)
    write_jsonl(folder / "other.jsonl", ROWS[:4])
    with caplog.at_level(logging.INFO):
        _, evaluations, _ = run(folder, "one-before", ckpt_path=checkpoint, **options)
    assert 0 in torch.load(checkpoint, weights_only=True)["bdpo_pl_run"]["evaluations"]
    assert (0 in evaluations) is (changed is None)
    said = rf"The validations before the stop measured something else \({changed}\): they are not compared"
    assert bool(re.search(said, caplog.text)) is (changed is not None)


def test_one_batch_is_not_all_of_them(folder, checkpoint, caplog):
    with caplog.at_level(logging.INFO):
        run(folder, "one-batch", ckpt_path=checkpoint, trainer={"limit_train_batches": 1})
    assert "limit_train_batches: 1.0 → 1 batch (takes effect" in caplog.text


def test_the_same_run_says_nothing_and_an_older_checkpoint_says_that(folder, checkpoint, caplog, tmp_path):
    with caplog.at_level(logging.INFO):
        run(folder, "one-same", ckpt_path=checkpoint)
    assert "differs" not in caplog.text
    saved = torch.load(checkpoint, weights_only=True)
    del saved["bdpo_pl_run"]
    torch.save(saved, tmp_path / "older.ckpt")
    with caplog.at_level(logging.INFO):
        run(folder, "one-older", ckpt_path=tmp_path / "older.ckpt")
    assert "was written by an earlier version" in caplog.text


def losses(**changed):
    options = {"tau": 0.5, "gamma_beta_ratio": 0.3, "weights": [1.0, 0.5], **changed}
    parts = [BalancedLoss(DPOLoss(), options["tau"]), SimPOLoss(gamma_beta_ratio=options["gamma_beta_ratio"])]
    return WPOLoss(WeightedSum(parts, options["weights"]))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"tau": 0.7}, {"loss.0.0.balance.tau"}),
        ({"gamma_beta_ratio": 0.4}, {"loss.0.1.gamma_beta_ratio"}),
        ({"weights": [1.0, 0.7]}, {"loss.0.factors"}),
    ],
)
def test_options_of_losses_within_losses_are_compared(changed, named, caplog):
    saved = {name: trait.to_plain() for name, trait in loss_traits(losses(), "loss").items()}
    assert check_resume(saved, loss_traits(losses(), "loss"), [], 0) == set()
    with caplog.at_level(logging.INFO):
        assert check_resume(saved, loss_traits(losses(**changed), "loss"), [], 0) == named
    assert next(iter(named)) in caplog.text
    # Another class within is another loss.
    other = WPOLoss(WeightedSum([BalancedLoss(DPOLoss(), 0.5), SFTLoss()], [1.0, 0.5]))
    with pytest.raises(InputError, match=r"another run: loss: \S+WPOLoss\(\S+WeightedSum\(.*SimPOLoss.* → .*SFTLoss"):
        check_resume(saved, loss_traits(other, "loss"), [], 0)


def test_other_labels_of_safety_are_other_data_where_the_loss_reads_them(folder):
    def labelled(name, *unsafe):
        rows = [{**row, "chosen_safe": True, "rejected_safe": i not in unsafe} for i, row in enumerate(ROWS)]
        write_jsonl(folder / name, rows)

    labelled("labelled.jsonl", 0)
    options = {"loss": SafeDPOLoss(), "trainer": {"max_steps": 1}}
    with pytest.raises(StoppedError):
        run(folder, "one-safe", SignalAt(signal.SIGTERM, 0, 0), pairs="labelled.jsonl", **options)
    checkpoint = folder / "one-safe" / "checkpoints" / "last.ckpt"
    labelled("labelled.jsonl", *range(12))
    with pytest.raises(InputError, match=r"run: safety of the data: .* unsafe of 38 .*resume\.allow '\[data\]'"):
        run(folder, "one-labels", ckpt_path=checkpoint, pairs="labelled.jsonl", **options)


def answers(good):
    return [{"prompt": f"q {i} ?", "completion": f"water {i} .", "label": i % 2 == good} for i in range(8)]


def flagged(unsafe):
    return [{**row, "chosen_safe": True, "rejected_safe": i >= unsafe} for i, row in enumerate(ROWS[:6])]


@pytest.mark.parametrize(
    ("loss", "rows", "said"),
    [
        (KTOLoss, answers, r"labels of the held-out data: 4 good of 8 answers .* → 4 good of 8 answers"),
        (SafeDPOLoss, flagged, r"safety of the held-out data: 0 unsafe of 12 responses .* → 1 unsafe of 12 responses"),
    ],
)
def test_other_labels_of_held_out_pairs_are_other_held_out_data(folder, caplog, loss, rows, said):
    name = f"one-{loss.__name__}"
    write_jsonl(folder / "labelled.jsonl", rows(0))
    options = {"loss": loss(), "pairs": "labelled.jsonl", "trainer": {"max_steps": 1}}
    options["data"] = {"held_out": str(folder / "held.jsonl")}
    write_jsonl(folder / "held.jsonl", rows(0))
    with pytest.raises(StoppedError):
        run(folder, name, SignalAt(signal.SIGTERM, 0, 0), **options)
    checkpoint = folder / name / "checkpoints" / "last.ckpt"
    write_jsonl(folder / "held.jsonl", rows(1))
    with caplog.at_level(logging.INFO):
        run(folder, f"{name}-labels", ckpt_path=checkpoint, **options)
    assert re.search(rf"  {said} .*\(takes effect from here on\)", caplog.text)
    assert "  held-out data" not in caplog.text


def test_traits_that_an_earlier_version_did_not_save_are_not_compared(caplog):
    now = {"gradient_clip_algorithm": Trait("value", "value"), "router_aux_loss": Trait(0.1, "0.1")}
    was = {"gradient_clip_algorithm": Trait("norm", "norm"), "router_aux_loss": Trait(0.0, "0.0")}
    for name in ("labels of the held-out data, hh", "safety of the held-out data"):
        now[name], was[name] = Trait("a", "a"), Trait("b", "b")
    assert check_resume({}, now, [], 0) == set()
    with caplog.at_level(logging.INFO):
        assert check_resume({name: trait.to_plain() for name, trait in was.items()}, now, [], 0) == set(now)
    assert "gradient_clip_algorithm: norm → value (takes effect from here on)" in caplog.text


def test_unknown_name_to_allow_is_refused():
    assert ResumeOptions(["loss", "data"]).allow == ["loss", "data"]
    with pytest.raises(InputError, match=r"resume\.allow names lr; .*data, tokenizer"):
        ResumeOptions(["lr"])


def test_identity_is_plain_values(checkpoint):
    saved = torch.load(checkpoint, weights_only=True)["bdpo_pl_run"]
    assert json.loads(json.dumps(saved["traits"])) == saved["traits"]
    assert {
        "data",
        "tokenizer",
        "template",
        "reference",
        "loss",
        "optimizer.lr",
        "router_aux_loss",
        "gradient_clip_algorithm",
        "batches",
        "seed",
        "precision",
    } <= set(saved["traits"])


class Trainer:
    """As much of one as `continue_metrics` asks for."""

    def __init__(self, logger):
        self.loggers = [logger]


def test_a_process_killed_while_the_rows_are_taken_over_loses_none(folder, checkpoint):
    mine = folder / "again"
    shutil.copytree(checkpoint.parents[1], mine)
    before = (mine / "metrics.csv").read_text()
    # As the process left it: the file has its other name, and the logger has begun one of its own.
    (mine / "metrics.csv").rename(mine / ".metrics.csv.kept")
    (mine / "metrics.csv").write_text("step\n")
    continue_metrics(Trainer(CSVLogger(mine, name="", version="")), str(mine / "checkpoints" / "last.ckpt"))
    assert (mine / "metrics.csv").read_text().splitlines() == before.splitlines()


def test_rows_are_kept_where_the_checkpoint_is_a_folder_of_parts(folder, checkpoint):
    mine = folder / "parts"
    shutil.copytree(checkpoint.parents[1], mine)
    last = mine / "checkpoints" / "last.ckpt"
    # As Lightning leaves it: plain values in a file of their own, beside the parts of weights.
    values = torch.load(last, weights_only=True)
    last.unlink()
    last.mkdir()
    torch.save({**values, "bdpo_pl_metrics_rows": 1}, last / "meta.pt")
    before = list(csv.DictReader((mine / "metrics.csv").open()))
    continue_metrics(Trainer(CSVLogger(mine, name="", version="")), str(last))
    assert list(csv.DictReader((mine / "metrics.csv").open())) == before[:1]


def test_a_row_after_those_of_a_finished_run_stands_under_its_own_columns(folder, checkpoint):
    """A finished run's file begins with `step` and `epoch`, and the logger writes in the order of names."""
    mine = folder / "longer"
    shutil.copytree(checkpoint.parents[1], mine)
    step_first(mine / "metrics.csv")
    before = list(csv.DictReader((mine / "metrics.csv").open()))
    logger = CSVLogger(mine, name="", version="")
    continue_metrics(Trainer(logger), str(mine / "checkpoints" / "last.ckpt"))
    logger.log_metrics({"epoch": 3, "held_out/loss": 0.5}, step=9)
    logger.save()
    *rows, last = csv.DictReader((mine / "metrics.csv").open())
    assert rows == before
    assert {name: value for name, value in last.items() if value} == {
        "epoch": "3",
        "held_out/loss": "0.5",
        "step": "9",
    }
