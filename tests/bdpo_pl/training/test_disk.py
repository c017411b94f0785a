"""What a run writes, and what it says of it."""

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from bdpo_pl.training.callbacks import LastCheckpoint
from bdpo_pl.training.disk import SaysDisk, plan_disk


def run(job, tmp_path, save_weights_only, monitor="held_out/loss", **trainer):
    best = ModelCheckpoint(
        tmp_path / "run" / "checkpoints", "best", monitor=monitor, save_weights_only=save_weights_only,
        auto_insert_metric_name=False,
    )  # fmt: skip
    callbacks = [best, LastCheckpoint(), SaysDisk(export=True)]
    built, module, data = job(trainer={"callbacks": callbacks, "max_epochs": 2, **trainer})
    built.fit(module, data)
    return built, module, tmp_path / "run" / "checkpoints"


def test_best_and_last_of_one_step_are_one_file(job, tmp_path):
    _, _, folder = run(job, tmp_path, save_weights_only=False)
    best, last = folder / "best.ckpt", folder / "last.ckpt"
    assert best.samefile(last)
    assert torch.load(last, weights_only=True)["global_step"] == 16
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_last_is_a_file_of_its_own_where_an_earlier_step_was_better(job, tmp_path):
    # The margin grows, so that by its least the first validation stays the best.
    _, _, folder = run(job, tmp_path, save_weights_only=False, monitor="held_out/margin")
    assert not (folder / "best.ckpt").samefile(folder / "last.ckpt")
    assert torch.load(folder / "best.ckpt", weights_only=True)["global_step"] == 8
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 16


def test_sizes_are_said_before_the_run_and_true(job, tmp_path, caplog):
    caplog.set_level("INFO")
    built, module, folder = run(job, tmp_path, save_weights_only=True)
    said = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("On the disk"))
    plan = plan_disk(built, module, export=True)
    # The rest is names, random state and counters.
    for planned, name in ((plan.last, "last.ckpt"), (plan.best, "best.ckpt")):
        written = (folder / name).stat().st_size
        assert planned <= written <= planned + 60_000
    assert plan.best * 3 == plan.last
    assert "exported model" in said
    assert "are free" in said


def test_too_small_a_disk_is_warned_of(job, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    run(job, tmp_path, save_weights_only=True)
    assert any("has 1.0 kB free" in str(warning.message) for warning in recwarn)
