"""Trackers get the options and the files of a run: stand-ins for W&B and MLflow, whose packages are not needed."""

import pytest
from lightning.pytorch.loggers import CSVLogger
from trackers import Mlflow, Wandb

from bdpo_pl.training.tracking import log_files, log_options


@pytest.fixture
def files(tmp_path):
    report = tmp_path / "report.html"
    report.write_text("<html>")
    return [report, tmp_path / "nowhere.yaml"]


def test_files_are_uploaded_to_trackers_that_take_them(files, tmp_path):
    wandb, mlflow = [], []
    log_files([CSVLogger(tmp_path), Wandb(wandb), Mlflow(mlflow)], files)
    assert wandb == [((str(files[0]),), {"name": "run7-report", "type": "report"})]
    assert mlflow == [("abc", str(files[0]))]


def test_options_are_logged_where_no_file_holds_them(tmp_path):
    options = {"model": {"loss": {"beta": 0.1}}}
    wandb, mlflow = [], []
    csv = CSVLogger(tmp_path)
    log_options([csv, Wandb(wandb), Mlflow(mlflow)], lambda: options)
    assert wandb == mlflow == [options]
    assert not csv.experiment.hparams
