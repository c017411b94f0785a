"""Options of Lightning's Trainer do what they say, beside ours too."""

import json
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from training import fit, same, weights

from bdpo_pl.data.samplers import TokenBatchSampler
from bdpo_pl.errors import InputError
from bdpo_pl.fit import main
from bdpo_pl.statistics import wilson
from bdpo_pl.training.callbacks import LastCheckpoint
from bdpo_pl.training.start_warnings import WarnsAtStart
from bdpo_pl.training.trainer_options import better, check_trainer


@pytest.fixture
def command(model_dir, preference_file, tmp_path, monkeypatch):
    """Runs `fit` on 40 pairs, 8 of them held out, and returns its summary and its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BDPO_PL_CACHE", str(tmp_path / "cache"))

    def run(*options):
        main([
            f"--model.policy={model_dir}", f"--data.train={preference_file}", "--data.held_out_fraction=0.2",
            "--data.batch_size=4", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.init_args.lr=2e-3",
            "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", *options,
        ])  # fmt: skip
        folder = tmp_path / "runs" / "version_0"
        return json.loads((folder / "summary.json").read_text()), folder

    return run


def test_pairs_that_a_limit_leaves_out_are_not_counted(command):
    """Of two held-out batches one is measured; the intervals said eight pairs."""
    summary, folder = command("--trainer.limit_val_batches=1", "--trainer.max_steps=1")
    rows = {row[0]: row[1:] for row in summary["rows"]}
    n, _, after = rows["held-out preference accuracy"]
    assert n == "4"
    low, high = wilson(float(after.partition("%")[0]) / 100 * 4, 4)
    assert after.endswith(f"[{100 * low:.1f}, {100 * high:.1f}]")
    assert ["notice", "Validations measured 4 of 8 held-out pairs: an option of the Trainer limits them "
            "(trainer.limit_val_batches, overfit_batches or fast_dev_run)."] in summary["said"]  # fmt: skip
    card = (folder / "model" / "README.md").read_text()
    assert "Measured on 4 held-out pairs" in card
    assert "| held-out pairs | 8 |" in card


@pytest.mark.parametrize(
    ("options", "share"),
    [
        (["--trainer.max_steps=2"], "25%"),
        (["--trainer.overfit_batches=2", "--trainer.max_epochs=9"], "25%"),
        (["--trainer.max_epochs=1"], None),
        (["--trainer.max_steps=2", "--data.train_probe=false"], None),
    ],
)
def test_a_gap_of_pairs_that_were_not_all_trained_on_says_so(command, options, share):
    """Of eight batches."""
    summary, _ = command(*options, "--export=false")
    remarks = [text for _, text in summary["said"] if "of the training data" in text]
    said = [text.split(" of the training data")[0] for text in remarks]
    assert said == ([f"The run trained on only {share}"] if share else [])


def test_the_best_checkpoint_is_that_of_the_command(command):
    """A checkpoint callback of the user's own came first, and its weights were exported as the best ones."""
    from safetensors.torch import load_file

    own = "{class_path: ModelCheckpoint, init_args: {monitor: step, mode: min, filename: own}}"
    _, folder = command("--export_from=best", f"--trainer.callbacks=[{own}]", "--trainer.val_check_interval=2")
    assert torch.load(folder / "checkpoints" / "own.ckpt", weights_only=True)["global_step"] == 2
    exported = load_file(folder / "model" / "model.safetensors")
    (best,) = (folder / "checkpoints").glob("best-step=*.ckpt")
    kept = torch.load(best, weights_only=True)["state_dict"]
    assert all(torch.equal(value, kept[f"policy.{name}"]) for name, value in exported.items())


@pytest.mark.parametrize("interval", [3, 8])
def test_weights_that_are_validated_after_the_last_step_may_be_the_best(command, interval):
    """Of eight steps, the last of which is the best one, whether the loop validates after it or not."""
    from safetensors.torch import load_file

    _, folder = command("--export_from=best", f"--trainer.val_check_interval={interval}")
    exported = load_file(folder / "model" / "model.safetensors")
    kept = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 8
    assert all(torch.equal(value, kept["state_dict"][f"policy.{name}"]) for name, value in exported.items())


def test_a_run_that_begins_in_the_folder_of_a_finished_one_is_refused(command, capsys):
    """It left the old model beside the new configuration and metrics, and wrote its own as model-2."""
    options = "--trainer.max_steps=1", "--trainer.logger.init_args.version=version_0"
    _, folder = command(*options)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        command(*options, "--trainer.max_steps=2")
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "is the folder of a finished run (it has model, summary.json)" in said
    assert "leave trainer.logger.init_args.version out" in said
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    command(*options, "--trainer.max_steps=2", "--ckpt_path=runs/version_0/checkpoints/last.ckpt")
    assert (folder / "model-2").is_dir()


def test_a_run_without_a_step_says_so(command):
    summary, _ = command("--trainer.limit_train_batches=0", "--export=false")
    assert summary["said"][0] == [
        "warning",
        "No step was taken, and the policy is as it was: raise trainer.max_steps, trainer.max_epochs or "
        "trainer.limit_train_batches.",
    ]


def test_a_short_validation_before_training_is_not_compared_with_whole_ones(job):
    whole = fit(job("whole", trainer={"num_sanity_val_steps": 2}))
    cut = fit(job("cut", trainer={"num_sanity_val_steps": 1}))
    assert whole.evaluations.keys() == {0, 8}
    assert cut.evaluations == {8: whole.evaluations[8]}


def test_a_limited_validation_by_tokens_is_not_of_the_longest_pairs():
    sizes = np.random.default_rng(0).integers(10, 100, 400)

    def mean(limit):
        sampler = TokenBatchSampler(sizes, 400)
        sampler.stop_after(limit)
        return np.mean([sizes[i] for batch in sampler for i, _ in batch]), len(list(sampler))

    everything, count = mean(len(TokenBatchSampler(sizes, 400)))
    part, few = mean(10)
    assert few == 10 < count
    assert part == pytest.approx(everything, rel=0.25)


def test_a_run_that_reloads_its_data_resumes_within_an_epoch(job, tmp_path):
    keep = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=10, save_top_k=-1, filename="{step}")
    trainer = {"max_epochs": 2, "num_sanity_val_steps": 0, "reload_dataloaders_every_n_epochs": 1}
    whole = fit(job("whole", trainer={**trainer, "callbacks": [keep]}))
    resumed = fit(job("resumed", trainer=trainer), ckpt_path=str(tmp_path / "ckpt" / "step=10.ckpt"))
    assert same(weights(whole), weights(resumed))


def test_the_last_checkpoint_is_of_the_last_step(job, tmp_path):
    """Of eight steps the last validation follows the sixth."""
    last = LastCheckpoint()
    module = fit(job(trainer={"val_check_interval": 3, "callbacks": [last]}))
    saved = torch.load(last.best_model_path, weights_only=True)
    assert saved["global_step"] == 8
    assert same(weights(module), {n.removeprefix("policy."): v for n, v in saved["state_dict"].items()})


def test_an_interval_beyond_an_epoch_is_refused(job):
    with pytest.raises(InputError, match=r"val_check_interval is 9 batches, but an epoch has 8: lower it, or set"):
        fit(job(trainer={"val_check_interval": 9}))
    fit(job(trainer={"val_check_interval": 9, "check_val_every_n_epoch": None}))


def test_steps_that_the_epochs_cut_and_a_log_without_lines_are_warned_of(job):
    with pytest.warns(UserWarning, match=r"trainer\.max_steps is 100, but trainer\.max_epochs 1 ends the run after 8"):
        fit(job("steps", trainer={"max_steps": 100, "callbacks": [WarnsAtStart()]}))
    with pytest.warns(UserWarning, match=r"log_every_n_steps is 50, but the run has 8 steps"):
        fit(job("log", trainer={"log_every_n_steps": 50, "callbacks": [WarnsAtStart()]}))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"trainer\.")
        fit(job("long", trainer={"max_epochs": -1, "max_steps": 9, "callbacks": [WarnsAtStart()]}))


def test_callbacks_that_keep_what_they_say_pass(job, tmp_path):
    for callback in (
        ModelCheckpoint(tmp_path, save_last=True, monitor="held_out/loss"),
        ModelCheckpoint(monitor="held_out/accuracy", mode="max"),
        ModelCheckpoint(monitor="train/loss", every_n_train_steps=2),
        ModelCheckpoint(every_n_train_steps=2, save_top_k=-1),
        ModelCheckpoint(monitor="own/accuracy"),
    ):
        check_trainer(job(trainer={"callbacks": [callback, LastCheckpoint()]})[0])
    # Without our last.ckpt Lightning's own is in nobody's way.
    check_trainer(job(trainer={"callbacks": [ModelCheckpoint(save_last=True)]})[0])
    assert [better(name) for name in ("held_out/pku/logp_accuracy", "safety/score", "epoch")] == ["max", None, None]
