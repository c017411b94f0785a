"""Fixtures that the tests of bdpo_pl share."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from makers import build_model, build_tokenizer, preference_rows, write_jsonl
from training import adamw

from bdpo_pl.scoring.scoring_pass import ScoringOptions
from bdpo_pl.training.callbacks import RandomState, SaveOnNonFinite
from bdpo_pl.training.datamodule import PreferenceDataModule
from bdpo_pl.training.module import PreferenceModule


@pytest.fixture(scope="session")
def chat_tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A saved Qwen2 with its tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("model")
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def preference_file(tmp_path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", preference_rows(40))


@pytest.fixture
def job(model_dir, tmp_path):
    """Builds (trainer, module, data) on small files; every option can be replaced."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", preference_rows(40))

    def build(folder="run", trainer=None, data=None, **model):
        torch.manual_seed(0)
        callbacks = [RandomState(), SaveOnNonFinite(), *(trainer or {}).pop("callbacks", [])]
        options = {
            "max_epochs": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": -1,
            "log_every_n_steps": 2,
            "gradient_clip_val": 1.0,
            "use_distributed_sampler": False,
            "logger": CSVLogger(tmp_path / folder, name="", version=""),
            "callbacks": callbacks,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        }
        scoring = ScoringOptions(cache_dir=str(tmp_path / "cache"))
        module = PreferenceModule(**{"policy": str(model_dir), "optimizer": adamw, "scoring": scoring, **model})
        datamodule = PreferenceDataModule(
            str(pairs), **{"held_out_fraction": 0.2, "batch_size": 4, "max_length": 128, **(data or {})}
        )
        return L.Trainer(**{**options, **(trainer or {})}), module, datamodule

    return build
