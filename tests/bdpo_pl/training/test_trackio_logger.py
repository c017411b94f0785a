"""trackio gets metrics, options, tables and files, in its own database on this machine, and nothing leaves it."""

import socket

import pytest
from training import fit

from bdpo_pl.cli.aliases import in_full
from bdpo_pl.errors import InputError
from bdpo_pl.losses import BalancedDPOLoss
from bdpo_pl.training.tracking import log_completions, log_files, log_options


@pytest.fixture
def trackio(tmp_path, monkeypatch):
    """The package, with a database of its own and no network."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("opened the network"))
    return pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")


def test_a_run_is_logged_whole_and_here_alone(trackio, job, tmp_path):
    from bdpo_pl.training.trackio_logger import TrackioLogger

    logger = TrackioLogger("tests", name="one run", save_dir=str(tmp_path / "runs"))
    log_options([logger], lambda: {"model": {"loss": {"beta": 0.1}}})
    rows = [{"step": 0, "prompt": "<b>p</b>", "completion": "c"}]
    log_completions([logger], "held_out", rows, 0)
    trainer, module, data = job(trainer={"logger": logger}, loss=BalancedDPOLoss(tau="auto"))
    fit((trainer, module, data))
    report = tmp_path / "report.html"
    report.write_text("<html>")
    log_files([logger], [report, tmp_path / "nowhere"])
    logger.run.finish()
    from trackio.sqlite_storage import SQLiteStorage

    logged = SQLiteStorage.get_logs("tests", "one run")
    losses = {row["step"]: row["train/loss"] for row in logged if "train/loss" in row}
    assert list(losses) == [1, 3, 5, 7]
    assert losses[7] == pytest.approx(float(trainer.logged_metrics["train/loss"]))
    assert (tmp_path / "runs" / "version_0" / "metrics.csv").is_file()
    (table,) = (row["completions/held_out"] for row in logged if "completions/held_out" in row)
    assert table["_value"] == rows
    config = SQLiteStorage.get_run_config("tests", "one run")
    assert config["model/loss/beta"] == 0.1
    # Known only when the pairs are scored.
    assert config["loss.tau"] > 0
    (artifact,) = SQLiteStorage.get_artifacts("tests")
    assert (artifact["name"], artifact["type"]) == ("one-run-report", "report")


def test_what_cannot_be(monkeypatch):
    from bdpo_pl.training import trackio_logger

    monkeypatch.setattr(trackio_logger.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install trackio"):
        trackio_logger.TrackioLogger()
    monkeypatch.setattr(trackio_logger.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(InputError, match=r"private is about trainer\.logger\.space_id, which is not set"):
        trackio_logger.TrackioLogger(private=True)
    with pytest.raises(InputError, match=r"set trainer\.logger\.name"):
        trackio_logger.TrackioLogger(resume="must")


def test_it_is_chosen_in_one_word():
    assert in_full(["--logger", "trackio"]) == ["--trainer.logger=bdpo_pl.training.trackio_logger.TrackioLogger"]
