"""A Trainer built in Python resumes as exactly as the command's, with one line."""

import logging
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from makers import build_model, build_tokenizer, preference_rows, write_jsonl
from stopped_ranks import SignalAt
from training import adamw, rows

import bdpo_pl
from bdpo_pl.errors import InputError, StoppedError
from bdpo_pl.losses import SimPOLoss
from bdpo_pl.scoring.scoring_pass import ScoringOptions
from bdpo_pl.training.checkpoints import LAST, AtomicCheckpointIO, StopSignals


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("python")
    build_model().save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "pairs.jsonl", preference_rows(24))
    return folder


def fit(folder, name, *callbacks, ckpt_path=None, loss=None):
    """Six steps, as a caller in Python would write it."""
    L.seed_everything(0)
    module = bdpo_pl.PreferenceModule(
        str(folder / "model"), loss, optimizer=adamw, scoring=ScoringOptions(cache_dir=str(folder / "cache"))
    )
    data = bdpo_pl.PreferenceDataModule(str(folder / "pairs.jsonl"), held_out_fraction=0.2, batch_size=8)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, num_sanity_val_steps=-1, log_every_n_steps=2, use_distributed_sampler=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
        logger=CSVLogger(folder / name, name="", version=""),
    )  # fmt: skip
    bdpo_pl.resumable(trainer, ckpt_path).fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer, {name: value.clone() for name, value in module.policy.state_dict().items()}


def test_a_stopped_run_goes_on_exactly_and_as_no_other(folder, monkeypatch):
    trainer, expected = fit(folder, "whole")
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    with pytest.raises(StoppedError, match=r"stopped by SIGTERM after 2 optimiser steps; .*last\.ckpt is written"):
        fit(folder, "stopped", SignalAt(signal.SIGTERM, 0, 1))
    last = folder / "stopped" / "checkpoints" / "last.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr("bdpo_pl.scoring.reference.score_table", lambda *_, **__: pytest.fail("scored"))
        with pytest.raises(InputError, match=r"another run: .*loss: \S+BalancedDPOLoss → \S+SimPOLoss"):
            fit(folder, "other", ckpt_path=last, loss=SimPOLoss())
    _, found = fit(folder, "stopped", ckpt_path=last)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    # In the folder of the stopped run its rows go on.
    assert rows(folder / "stopped" / "metrics.csv") == rows(folder / "whole" / "metrics.csv")


class StopAfter(L.Callback):
    """Ends training after a batch as `max_steps` would, which leaves the schedule of the learning rate as it is."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == self.batches


@pytest.mark.parametrize("step", [1, 4])
def test_the_rest_of_an_epoch_that_ended_early_is_trained_on(folder, tmp_path, step):
    """Step 4 is the first of the last epoch: without its rest nothing would be left."""
    _, expected = fit(folder, tmp_path / "whole")
    trainer, _ = fit(folder, tmp_path / "early", StopAfter(step))
    assert trainer.global_step == step
    trainer, found = fit(folder, tmp_path / "early", ckpt_path=tmp_path / "early" / "checkpoints" / "last.ckpt")
    assert trainer.global_step == 6
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_best_checkpoint_before_a_stop_stays_the_best_in_another_folder(folder, tmp_path, caplog):
    def best():
        # The drift of the chosen grows, so that by its least the first validation stays the best.
        return ModelCheckpoint(monitor="held_out/drift_chosen", filename="best-{step}", save_weights_only=True)

    fit(folder, tmp_path / "early", StopAfter(4), best())
    first, last = tmp_path / "early" / "checkpoints" / "best-step=3.ckpt", tmp_path / "early" / "checkpoints" / LAST
    score = torch.load(last, weights_only=True)["callbacks"]
    score = next(state["best_model_score"] for state in score.values() if state.get("monitor"))
    with caplog.at_level(logging.INFO):
        trainer, _ = fit(folder, tmp_path / "later", kept := best(), ckpt_path=last)
    assert trainer.global_step == 6
    assert (kept.best_model_path, kept.best_model_score) == (str(first), score)
    assert f"is {first} (held_out/drift_chosen {score:.4f}); it stays the best one until" in caplog.text
    assert first.exists()
    # One that is gone is not the best of anything.
    first.unlink()
    with caplog.at_level(logging.INFO):
        fit(folder, tmp_path / "gone", found := best(), ckpt_path=last)
    assert found.best_model_path == str(tmp_path / "gone" / "checkpoints" / "best-step=6.ckpt")
    assert "is no longer there: the best one is chosen from the validations that follow" in caplog.text


def test_what_the_trainer_has_already_stays(folder):
    mine = StopSignals()
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[mine], enable_progress_bar=False)
    kinds = [type(callback) for callback in bdpo_pl.resumable(trainer).callbacks]
    assert [callback for callback in trainer.callbacks if isinstance(callback, StopSignals)] == [mine]
    assert [type(callback) for callback in bdpo_pl.resumable(trainer).callbacks] == kinds
    with pytest.raises(InputError, match="no checkpoint at"):
        bdpo_pl.resumable(trainer, folder / "nowhere.ckpt")
