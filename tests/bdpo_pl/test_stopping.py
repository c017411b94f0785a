"""A signal at any moment ends a command with its own status, and what is saved is said; a resume goes on exactly."""

import os
import re
import signal

import lightning as L
import pytest
import torch
from makers import preference_rows, write_jsonl
from training import rows

from bdpo_pl.cli import aligning
from bdpo_pl.errors import StoppedError
from bdpo_pl.fit import main
from bdpo_pl.training.callbacks import LastCheckpoint
from bdpo_pl.training.checkpoints import LAST, AtomicCheckpointIO
from bdpo_pl.training.module import PreferenceModule

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


class Runs:
    """`fit` in this process, in a folder of its own."""

    def __init__(self, model_dir, folder):
        self.folder = folder
        write_jsonl(folder / "pairs.jsonl", preference_rows(40))
        write_jsonl(folder / "harmful.jsonl", [{"prompt": "how do i keep my garden safe ?"}])
        self.options = [
            f"--model.policy={model_dir}",
            f"--data.train={folder / 'pairs.jsonl'}",
            "--data.held_out_fraction=0.2",
            "--model.optimizer=torch.optim.AdamW",
            "--model.optimizer.init_args.lr=2e-3",
            f"--safety.harmful={folder / 'harmful.jsonl'}",
            "--safety.max_new_tokens=2",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--trainer.val_check_interval=2",
            "--trainer.log_every_n_steps=1",
        ]

    def __call__(self, *options):
        """The exit status, None where the run came to its end."""
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setenv("BDPO_PL_CACHE", str(self.folder / "cache"))
            try:
                main([*self.options, *options])
            except SystemExit as ended:
                return ended.code
            finally:
                assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


@pytest.fixture(scope="module")
def runs(model_dir, tmp_path_factory):
    return Runs(model_dir, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs):
    """The rows of the run that nothing stops: four steps, two validations."""
    assert runs("--trainer.logger.init_args.version=whole") is None
    return rows(runs.folder / "runs" / "whole" / "metrics.csv")


def printed(capfd):
    texts = capfd.readouterr()
    return " ".join((texts.out + texts.err).split())


def signal_in(monkeypatch, target, number, times=1, when=lambda *_: True):
    """Send this process the signal in the call of `target` for which `when` is true the `times`-th time."""
    name = target.rpartition(".")[2]
    owner = target.removesuffix(f".{name}")
    module, _, attribute = owner.partition(":")
    place = __import__(module, fromlist=["_"])
    place = getattr(place, attribute) if attribute else place
    real, count = getattr(place, name), [0]

    def signalled(*args, **kwargs):
        if when(*args):
            count[0] += 1
            if count[0] == times:
                os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, signalled)


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("bdpo_pl.training.datamodule.load_pairs", signal.SIGINT),
        ("bdpo_pl.scoring.scoring_pass.score_pairs", signal.SIGTERM),
        ("bdpo_pl.training.module:PreferenceModule.validation_step", signal.SIGTERM),
        ("bdpo_pl.training.safety_probe.generate_responses", signal.SIGINT),
    ],
)
def test_before_the_first_step(runs, monkeypatch, tmp_path, capfd, place, number):
    signal_in(monkeypatch, place, number)
    monkeypatch.setattr(PreferenceModule, "training_step", lambda *_: pytest.fail("trained"))
    assert runs(f"--model.scoring.cache_dir={tmp_path}") == STATUS[number]
    assert f"stopped by {number.name}; no step is saved yet; the same command begins again" in printed(capfd)


def test_a_last_step_that_no_validation_follows_is_measured_and_logged_after_the_resume(runs, monkeypatch):
    """Stopped once the last step is done, the run measures it before it goes on, which no log would hold."""
    short, version = "--trainer.max_steps=3", "--trainer.logger.init_args.version"
    assert runs(short, f"{version}=three") is None
    expected = rows(runs.folder / "runs" / "three" / "metrics.csv")
    assert [row["step"] for row in expected if "held_out/loss" in row][-1] == "3"
    with monkeypatch.context() as patch:
        signal_in(patch, "bdpo_pl.training.safety_probe.generate_responses", signal.SIGTERM, 2)
        assert runs(short, f"{version}=stopped-three") == 143
    folder = runs.folder / "runs" / "stopped-three"
    assert runs(short, f"{version}=stopped-three", f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}") is None
    assert rows(folder / "metrics.csv") == expected


@pytest.mark.parametrize(
    ("place", "number", "times", "when"),
    [
        ("bdpo_pl.training.module:PreferenceModule.training_step", signal.SIGTERM, 3, None),
        # Validations before training, after step 2 and after step 4: held-out pairs and the probe, a batch each.
        ("bdpo_pl.training.module:PreferenceModule.validation_step", signal.SIGINT, 5, None),
        ("bdpo_pl.training.module:PreferenceModule.validation_step", signal.SIGTERM, 1, "last"),
        ("bdpo_pl.training.checkpoints:AtomicCheckpointIO.save_checkpoint", signal.SIGTERM, 1, None),
        ("bdpo_pl.training.safety_probe.generate_responses", signal.SIGTERM, 2, None),
        ("bdpo_pl.cli.aligning.export_model", signal.SIGINT, 1, None),
    ],
)
def test_in_training_and_after_it(runs, whole, monkeypatch, capfd, request, place, number, times, when):
    def at_the_last_step(module, *_):
        return not module.trainer.sanity_checking and module.global_step == 4

    version = f"v{request.node.callspec.indices['place']}"
    folder = runs.folder / "runs" / version
    with monkeypatch.context() as patch:
        signal_in(patch, place, number, times, at_the_last_step if when else lambda *_: True)
        assert runs(f"--trainer.logger.init_args.version={version}") == STATUS[number]
    checkpoint = re.search(r"resume with the same command and --ckpt_path (\S+last\.ckpt)", printed(capfd))[1]
    assert not (folder / "model").exists()
    # In the folder that it began in: the metrics go on, and the table has its column "before".
    assert runs(f"--ckpt_path={checkpoint}", f"--trainer.logger.init_args.version={version}") is None
    assert rows(folder / "metrics.csv") == whole
    said = printed(capfd)
    assert "differs" not in said
    table = said[said.index("What changed") :]
    assert "–" not in table[: table.index("Written")]
    assert (folder / "model").is_dir()


def test_what_is_saved_is_said_without_asking_another_process(runs, monkeypatch, tmp_path, capfd):
    """The others may train on, and would never answer."""

    def stopped(cli, *_):
        last = next(callback for callback in cli.trainer.callbacks if isinstance(callback, LastCheckpoint))
        # As with W&B, not in the folder of the logger.
        last.dirpath = str(tmp_path)
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / LAST)
        monkeypatch.setattr(L.Trainer, "log_dir", property(lambda _: pytest.fail("asked")))
        raise StoppedError("stopped by SIGTERM", signal.SIGTERM)

    monkeypatch.setattr(aligning, "_align", stopped)
    assert runs("--trainer.logger.init_args.version=asked") == 143
    assert f"stopped by SIGTERM; {tmp_path / LAST} is written; resume with the same command" in printed(capfd)
    monkeypatch.undo()
    # Another process than the first has no folder.
    monkeypatch.setattr(aligning, "_align", stopped)
    monkeypatch.setattr(aligning.rank_zero_only, "rank", 1)
    assert runs() == 143
    assert printed(capfd).endswith("error: stopped by SIGTERM")


def test_dropout_after_a_stop_is_that_of_a_run_that_nothing_stops(runs, monkeypatch):
    """Whatever the command's own callbacks compute before the first step draws no number."""

    def run(version, *options):
        options += "--model.lora.r=4", "--model.lora.dropout=0.5", "--trainer.max_steps=3", "--export=false"
        return runs(*options, f"--trainer.logger.init_args.version={version}")

    def last(version):
        return runs.folder / "runs" / version / "checkpoints" / "last.ckpt"

    assert run("dropout") is None
    with monkeypatch.context() as patch:
        signal_in(patch, "bdpo_pl.training.module:PreferenceModule.training_step", signal.SIGTERM, 2)
        assert run("dropout-stopped") == 143
    assert run("dropout-stopped", f"--ckpt_path={last('dropout-stopped')}") is None
    expected, found = (
        torch.load(last(name), weights_only=True)["state_dict"] for name in ("dropout", "dropout-stopped")
    )
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
