"""A run under torchrun's launcher goes on by itself after a process was killed."""

import csv

import elastic_ranks
import pytest
import torch
from makers import preference_rows, write_jsonl
from safetensors.torch import load_file

from bdpo_pl.fit import main
from bdpo_pl.training.checkpoints import find_checkpoint


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")
def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(model_dir, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(40))
    options = [
        f"--model.policy={model_dir}", f"--data.train={tmp_path / 'pairs.jsonl'}", "--data.held_out_fraction=0.2",
        # With eps at its default of 1e-8 the rounding of a gradient that is nearly 0 becomes a step of its own.
        "--lr=2e-3", "--model.optimizer.eps=1e-6", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        "--data.train_probe=false", "--trainer.num_sanity_val_steps=0",
    ]  # fmt: skip
    elastic = [
        *options, "--trainer.default_root_dir=elastic", "--trainer.strategy=ddp", "--trainer.devices=2",
        "--data.batch_size=4", "--trainer.val_check_interval=2", "--ckpt_path=auto",
        "--trainer.callbacks=elastic_ranks.KillOnce", f"--trainer.callbacks.marker={tmp_path / 'killed'}",
    ]  # fmt: skip
    # Otherwise torch 2.13 gives the second attempt the store of the first, with addresses of dead processes.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    attempts = elastic_ranks.launch(tmp_path, elastic)
    assert (tmp_path / "killed").read_text() == "2"
    assert attempts == {0: "1", 1: "1"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BDPO_PL_CACHE", str(tmp_path / "cache"))
    main([*options, "--data.batch_size=8", "--trainer.default_root_dir=whole"])
    # The second attempt went on from the checkpoint of step 2, and ended in the weights of one undisturbed process.
    with (tmp_path / "elastic/version_1/metrics.csv").open() as file:
        steps = {int(row["step"]) for row in csv.DictReader(file)}
    assert min(steps) >= 2
    assert not (tmp_path / "elastic/version_0/model").exists()
    whole = load_file(tmp_path / "whole/version_0/model/model.safetensors")
    found = load_file(tmp_path / "elastic/version_1/model/model.safetensors")
    assert all(torch.allclose(found[name], whole[name], rtol=0, atol=1e-5) for name in whole)


def test_auto_resumes_from_the_newest_checkpoint_if_there_is_one(tmp_path):
    assert find_checkpoint("auto", tmp_path) is None
    folder = tmp_path / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"state_dict": {}}, folder / "last.ckpt")
    assert find_checkpoint("auto", tmp_path) == str(folder / "last.ckpt")
    (folder / "last.ckpt").write_bytes(b"half")
    with pytest.warns(UserWarning, match="--ckpt_path auto: .* is not whole"):
        assert find_checkpoint("auto", tmp_path) is None
