"""What a run writes, and what it says of it."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from makers import build_model

from bdpo_pl.losses import DPOLoss
from bdpo_pl.scoring.reference_sync import SyncOptions
from bdpo_pl.training import callbacks
from bdpo_pl.training.callbacks import LastCheckpoint, log_interval
from bdpo_pl.training.disk import SaysDisk, plan_disk

# The drift of the chosen grows, so that by its least the first validation stays the best.
FIRST_IS_BEST = {"monitor": "held_out/drift_chosen", "mode": "min"}


def run(job, tmp_path, save_weights_only, by=None, model=None, **trainer):
    best = ModelCheckpoint(
        tmp_path / "run" / "checkpoints", "best", save_weights_only=save_weights_only, auto_insert_metric_name=False,
        **(by or {"monitor": "held_out/loss"}),
    )  # fmt: skip
    callbacks = [best, LastCheckpoint(), SaysDisk(export=True)]
    built, module, data = job(trainer={"callbacks": callbacks, "max_epochs": 2, **trainer}, **(model or {}))
    built.fit(module, data)
    return built, module, tmp_path / "run" / "checkpoints"


def test_best_and_last_of_one_step_are_one_file(job, tmp_path):
    _, _, folder = run(job, tmp_path, save_weights_only=False)
    best, last = folder / "best.ckpt", folder / "last.ckpt"
    assert best.samefile(last)
    assert torch.load(last, weights_only=True)["global_step"] == 16
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_last_is_a_file_of_its_own_where_an_earlier_step_was_better(job, tmp_path):
    _, _, folder = run(job, tmp_path, save_weights_only=False, by=FIRST_IS_BEST)
    assert not (folder / "best.ckpt").samefile(folder / "last.ckpt")
    assert torch.load(folder / "best.ckpt", weights_only=True)["global_step"] == 8
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 16


def test_best_weights_that_are_the_last_ones_take_no_space_of_their_own(job, tmp_path):
    _, _, folder = run(job, tmp_path, save_weights_only=True)
    best, last = folder / "best.ckpt", folder / "last.ckpt"
    assert best.samefile(last)
    assert "optimizer_states" in torch.load(best, weights_only=True)
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_best_weights_that_are_not_the_last_ones_keep_their_file(job, tmp_path):
    class Moved(L.Callback):
        """Changes a weight after the last validation, as averaging of weights may."""

        def on_train_end(self, trainer, pl_module):
            with torch.no_grad():
                next(pl_module.policy.parameters()).add_(1.0)

    class Late(LastCheckpoint):
        """Writes after the change."""

        def on_train_end(self, trainer, pl_module):
            self.write_now(trainer, tmp_path / "run" / "checkpoints" / "last.ckpt")
            super().on_train_end(trainer, pl_module)

    best = ModelCheckpoint(tmp_path / "run" / "checkpoints", "best", monitor="held_out/loss", save_weights_only=True)
    built, module, data = job(trainer={"callbacks": [Moved(), best, Late()], "max_epochs": 2})
    built.fit(module, data)
    assert best.best_model_path
    kept = torch.load(best.best_model_path, weights_only=True)
    assert kept["global_step"] == 16
    assert "optimizer_states" not in kept


def test_sizes_are_said_before_the_run_and_true(job, tmp_path, caplog):
    caplog.set_level("INFO")
    # Each checkpoint has a file of its own.
    built, module, folder = run(job, tmp_path, save_weights_only=True, by=FIRST_IS_BEST)
    said = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("On the disk"))
    plan = plan_disk(built, module, export=True)
    # The rest is names, random state and counters.
    for planned, name in ((plan.last, "last.ckpt"), (plan.best, "best.ckpt")):
        written = (folder / name).stat().st_size
        assert planned <= written <= planned + 60_000
    assert plan.best * 3 == plan.last
    assert "exported model" in said
    assert "are free" in said


def test_frozen_weights_are_exported_but_in_no_checkpoint(job):
    built, module, _ = job(trainer={"callbacks": [ModelCheckpoint(save_weights_only=True)]})
    module.policy = build_model()
    module.policy.model.embed_tokens.requires_grad_(False)
    frozen = sum(p.numel() for p in module.policy.model.embed_tokens.parameters())
    plan = plan_disk(built, module, export=True)
    assert plan.export - plan.best == 4 * frozen
    assert plan.last == 3 * plan.best


def test_quantised_weights_are_exported_as_they_were_before(job):
    built, module, _ = job()
    module.trainer, module.policy = built, build_model()
    layer = module.policy.model.layers[0].mlp.gate_proj.requires_grad_(False)
    whole = plan_disk(built, module, export=True).export
    state = SimpleNamespace(shape=layer.weight.shape)
    # Two weights in a byte, as bitsandbytes packs them.
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    layer.weight.quant_state = state
    assert plan_disk(built, module, export=True).export == whole


def test_a_reference_that_follows_the_policy_takes_space_too(job, tmp_path):
    model = {"loss": DPOLoss(), "reference_sync": SyncOptions(every=2)}
    built, module, folder = run(job, tmp_path, True, FIRST_IS_BEST, model, max_epochs=1)
    plan = plan_disk(built, module, export=False)
    assert plan.last <= (folder / "last.ckpt").stat().st_size <= plan.last + 60_000


def test_too_small_a_disk_is_warned_of(job, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    run(job, tmp_path, save_weights_only=True)
    assert any("has 1.0 kB free" in str(warning.message) for warning in recwarn)


class Written(LastCheckpoint):
    """Counts the files that are written, at the seconds of a clock that goes on with each optimiser step."""

    def __init__(self, per_step):
        super().__init__(clock=lambda: per_step * self.job.global_step)
        self.steps = []

    def on_train_start(self, trainer, pl_module):
        self.job = trainer
        super().on_train_start(trainer, pl_module)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize(("per_step", "steps"), [(1.0, [8]), (100.0, [4, 8])])
def test_a_large_last_checkpoint_waits_for_minutes_or_the_end(job, tmp_path, monkeypatch, per_step, steps):
    monkeypatch.setattr(callbacks, "_LARGE_BYTES", 1)
    last = Written(per_step)
    built, module, data = job(trainer={"callbacks": [last], "val_check_interval": 2})
    built.fit(module, data)
    assert last.steps == steps
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8


def test_what_was_put_off_is_written_where_a_run_ends_between_validations(job, tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "_LARGE_BYTES", 1)
    last = Written(1.0)
    built, module, data = job(trainer={"callbacks": [last], "max_steps": 3, "val_check_interval": 2})
    built.fit(module, data)
    assert last.steps == [3]
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


def test_a_short_run_logs_each_step():
    assert [log_interval(steps) for steps in (1, 8, 19, 20, 49, 50, 10_000)] == [1, 1, 1, 2, 4, 5, 5]
