"""What version 0.1 wrote still works: its checkpoints, and the names in its YAML files."""

from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from makers import build_model, build_tokenizer, preference_rows, write_jsonl
from training import weights

from bdpo_pl import PreferenceDataModule, PreferenceModule
from bdpo_pl.fit import main
from bdpo_pl.losses import BalancedDPOLoss
from bdpo_pl.scoring.scoring_pass import ScoringOptions
from bdpo_pl.training.callbacks import RandomState, SaveOnNonFinite
from bdpo_pl.training.optim import adamw

CHECKPOINT = Path(__file__).parents[2] / "data" / "checkpoint-0.1.ckpt"
"""Written by version 0.1 after 5 of 8 steps of the run below, with comprehension re-estimated at step 3."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    # The checkpoint names the policy by the path it had.
    monkeypatch.chdir(tmp_path)
    build_model(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=True,
    ).save_pretrained("model")  # fmt: skip
    build_tokenizer().save_pretrained("model")
    write_jsonl(Path("pairs.jsonl"), preference_rows(40))

    def fit(ckpt_path=None):
        torch.manual_seed(0)
        module = PreferenceModule(
            "model",
            loss=BalancedDPOLoss(tau=0.25),
            optimizer=lambda params: torch.optim.SGD(params, lr=0.5),
            scoring=ScoringOptions(cache_dir="cache"),
            reestimate_every=3,
        )
        data = PreferenceDataModule("pairs.jsonl", held_out_fraction=0.2, batch_size=4, max_length=128)
        trainer = L.Trainer(
            max_epochs=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
            num_sanity_val_steps=-1, log_every_n_steps=2, gradient_clip_val=1.0, use_distributed_sampler=False,
            logger=False,
            callbacks=[
                RandomState(), SaveOnNonFinite(),
                ModelCheckpoint("ckpt", every_n_train_steps=5, save_top_k=-1, filename="{step}"),
            ],
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return module

    return fit


def test_a_checkpoint_of_version_0_1_goes_on_to_the_same_weights(run):
    whole, resumed = run(), run(CHECKPOINT)
    assert resumed.reestimation.state_dict()["step"] == 6
    # Not the same bits: the checkpoint was computed by other kernels, on another machine.
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=2e-6)
    assert whole.evaluations[8] == pytest.approx(resumed.evaluations[8], abs=1e-5)


def test_names_in_yaml_files_of_version_0_1_still_parse(tmp_path, capsys):
    config = tmp_path / "old.yaml"
    # As --print_config wrote it where no optimiser was named.
    model = {"policy": "x", "optimizer": "bdpo_pl.module.adamw", "loss": {"class_path": "bdpo_pl.losses.DPOLoss"}}
    config.write_text(yaml.safe_dump({"model": model, "data": {"train": "y"}}))
    with pytest.raises(SystemExit) as exit:
        main([f"--config={config}", "--print_config"])
    assert exit.value.code in (None, 0)
    assert yaml.safe_load(capsys.readouterr().out)["model"]["loss"]["class_path"] == "bdpo_pl.losses.DPOLoss"
    import bdpo_pl.module

    assert bdpo_pl.module.adamw is adamw
