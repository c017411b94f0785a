"""The commands of `examples/skypilot.yaml`, as two nodes with a process each, train as one process does."""

import subprocess
from pathlib import Path

import agents
import torch
import yaml
from children import free_port
from makers import preference_rows, write_jsonl
from safetensors.torch import load_file

from bdpo_pl.fit import main

TASK = yaml.safe_load((Path(__file__).parents[2] / "examples" / "skypilot.yaml").read_text())


def test_two_nodes_train_as_one_process(model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("BDPO_PL_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(24))
    options = [
        # With eps at its default of 1e-8 the rounding of a gradient that is nearly 0 becomes a step of its own.
        "--lr=2e-3", "--model.optimizer.eps=1e-6", "--data.held_out_fraction=0.2", "--data.train_probe=false",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.num_sanity_val_steps=0",
        "--trainer.max_steps=2",
    ]  # fmt: skip
    port = free_port()
    # `torchrun` only prints its arguments, a line each.
    (tmp_path / "torchrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    # A folder of each node's own, as the configuration names one.
    of_nodes = "--trainer.strategy=ddp", "--data.batch_size=4", "--model.scoring.cache_dir=runs/score_cache"
    commands = []
    for node in range(TASK["num_nodes"]):
        environment = {
            **TASK["envs"], "MODEL": model_dir, "DATA": tmp_path / "pairs.jsonl", "ROOT": tmp_path / "runs",
            "CACHE": tmp_path / "scores", "OPTIONS": " ".join([*options, *of_nodes]),
            "PORT": port, "SKYPILOT_NUM_NODES": TASK["num_nodes"], "SKYPILOT_NUM_GPUS_PER_NODE": 1,
            "SKYPILOT_NODE_RANK": node, "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
            "PATH": f"{tmp_path}:/usr/bin:/bin",
        }  # fmt: skip
        environment = {name: str(value) for name, value in environment.items()}
        done = subprocess.run(
            ["bash", "-euc", TASK["run"]], env=environment, capture_output=True, text=True, check=True
        )
        commands.append(done.stdout.splitlines())
    agents.run_nodes(commands, tmp_path)

    monkeypatch.chdir(tmp_path)
    main([
        *options, f"--model.policy={model_dir}", "--data.train=pairs.jsonl", "--data.batch_size=8",
        "--trainer.default_root_dir=whole",
    ])  # fmt: skip
    found, whole = (
        load_file(tmp_path / root / "version_0" / "model" / "model.safetensors") for root in ("runs", "whole")
    )
    assert all(torch.allclose(found[name], whole[name], rtol=0, atol=1e-5) for name in whole)
