"""Planned memory of what is kept on the host, against what a step allocates with a pretended GPU; how it is told."""

import json
import re

import offload_ranks
import pytest
import torch
from children import start
from lightning.pytorch.accelerators import CPUAccelerator
from makers import build_model
from training import adamw

from bdpo_pl.models import activation_offloading
from bdpo_pl.models.adapters import LoraOptions
from bdpo_pl.models.loading import ModelSource
from bdpo_pl.training import memory_report, start_checks
from bdpo_pl.training.memory_plan import plan_memory
from bdpo_pl.training.memory_report import host_verdict
from bdpo_pl.training.parameter_counts import Devices
from bdpo_pl.training.planned_batches import worst_batch
from bdpo_pl.training.planned_host import HostMemory
from bdpo_pl.training.planned_reference import plan_offloaded_reference, plan_reference

BATCH = worst_batch(4, 128, True)
SOURCE = ModelSource("tiny")


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.setattr(activation_offloading, "MIN_BYTES", offload_ranks.LARGE)
    config = build_model(**offload_ranks.SIZES).config

    def build(weights, activations, ranks=2, **options):
        devices = Devices(ranks, 1, True, "cuda", weights)
        return plan_memory(
            SOURCE, config, BATCH, torch.float32, adamw, devices, activation_offloading=activations, **options
        )

    return build


def test_plan_is_within_15_percent_of_what_a_step_allocates(plan, tmp_path):
    build_model(**offload_ranks.SIZES).save_pretrained(tmp_path)
    start(offload_ranks.peaks, (tmp_path,), 1)
    found = json.loads((tmp_path / "peaks.json").read_text())
    for name, kept in offload_ranks.CASES.items():
        planned = plan(*kept)
        assert planned.peak == pytest.approx(found[name]["gpu"], rel=0.15), name
        if any(kept):
            assert planned.offloaded.each == pytest.approx(found[name]["cpu"], rel=0.15), name
        else:
            assert planned.offloaded is None
    # Either leaves less on the device, and both leave least.
    most = [found[name]["gpu"] for name in ("nothing", "weights", "activations", "both")]
    assert most == sorted(most, reverse=True)


def test_weights_gradients_and_state_move_from_the_device_to_the_host(plan):
    held, kept = plan(False, False), plan(True, False)
    assert (kept.weights, kept.optimizer) == (0, 0)
    assert kept.gathered == held.gathered
    assert kept.offloaded.weights == held.weights
    assert kept.offloaded.optimizer == held.optimizer
    # What is left of the gradients are those of a block that is not scattered yet.
    assert kept.gradients == held.gradients - kept.offloaded.gradients > 0
    alone = plan(True, False, ranks=1)
    assert alone.offloaded.weights == pytest.approx(2 * kept.offloaded.weights, abs=2)
    assert alone.gathered == kept.gathered
    lora = plan(True, False, lora=LoraOptions(r=4))
    assert lora.offloaded.gradients < lora.offloaded.weights / 10


def test_with_checkpointing_the_inputs_of_the_layers_move(plan):
    R, T = BATCH.input_ids.shape
    entering = 4 * R * T * offload_ranks.SIZES["hidden_size"]
    recomputed, both = plan(False, False, gradient_checkpointing=True), plan(False, True, gradient_checkpointing=True)
    assert both.offloaded == HostMemory(activations=offload_ranks.SIZES["num_hidden_layers"] * entering)
    assert both.peak < recomputed.peak
    assert both.offloaded.activations < plan(False, True).offloaded.activations / 5


def test_small_activations_stay(plan, monkeypatch):
    monkeypatch.setattr(activation_offloading, "MIN_BYTES", 2**40)
    assert plan(False, True).offloaded is None
    assert plan(False, True).activations == plan(False, False).activations


def test_copies_of_autocast_move_with_activations(plan):
    config = build_model(**offload_ranks.SIZES).config

    def alone(moves):
        return plan_memory(
            SOURCE, config, BATCH, torch.float32, adamw, Devices(), activation_offloading=moves,
            half_products=torch.bfloat16,
        )  # fmt: skip

    numel = sum(p.numel() for p in build_model(**offload_ranks.SIZES).parameters())
    assert alone(False).gathered == 2 * numel
    assert alone(True).gathered < alone(False).gathered
    tables = 2 * 2 * offload_ranks.SIZES["vocab_size"] * offload_ranks.SIZES["hidden_size"]
    more = alone(True).offloaded.activations - plan(False, True, half_products=torch.bfloat16).offloaded.activations
    assert more == pytest.approx(2 * numel - tables, rel=0.01)


def test_reference_of_the_scoring_pass_is_on_the_host_too():
    model = build_model()
    numel = sum(p.numel() for p in model.parameters())
    devices = Devices(2, 1, True, "cuda", True)
    kept = plan_offloaded_reference(SOURCE, model.config, torch.float32, devices, torch.bfloat16)
    assert kept == numel
    split = plan_reference(SOURCE, model.config, torch.float32, Devices(2, 1, True, "cuda"), torch.bfloat16)
    assert plan_reference(SOURCE, model.config, torch.float32, devices, torch.bfloat16) == split - kept


def test_host_memory_counts_each_process_and_what_is_there_at_once():
    assert HostMemory(weights=4, optimizer=8, reference=5, processes=2).total == 24
    assert HostMemory(weights=4, reference=5).total == 5
    assert HostMemory(weights=4, reference=5, live=True).total == 9
    label = HostMemory(weights=2**30, gradients=2**29, processes=8).label
    assert label == "host memory of 8 processes, each: weights 1.000, gradients 0.500"


def test_verdict_names_both_sides():
    assert "needs 20.0 GB, which does not fit into 16.0 GB (125%); pinned" in host_verdict(20 * 10**9, 16 * 10**9)
    assert "which fits into 32.0 GB" in host_verdict(20 * 10**9, 32 * 10**9)


@pytest.fixture
def dry_run(model_dir, tmp_path, monkeypatch, capsys):
    def run(*options):
        from bdpo_pl.fit import main

        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "240")
        main([f"--model.policy={model_dir}", "--trainer.accelerator=cpu", "--dry_run=true", *options])
        return " ".join(capsys.readouterr().out.split())

    return run


OFFLOAD = [
    "--trainer.strategy=bdpo_pl.parallel.fsdp2.ShardedStrategy",
    "--trainer.strategy.cpu_offload=true",
    "--trainer.devices=2",
]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (OFFLOAD, "trainer.strategy.cpu_offload keeps"),
        (["--activation_offloading"], "model.activation_offloading moves"),
    ],
)
def test_what_would_do_nothing_is_refused_without_a_gpu(dry_run, capsys, options, reason):
    with pytest.raises(SystemExit):
        dry_run(*options)
    printed = " ".join(capsys.readouterr().err.split())
    assert reason in printed
    assert "leave it out, or set trainer.accelerator to gpu" in printed


def test_dry_run_for_gpus_says_what_the_host_would_save(dry_run, monkeypatch):
    """With a CPU that is taken for a GPU, where the plan asks for the kind of device."""
    monkeypatch.setattr(start_checks, "CUDAAccelerator", CPUAccelerator)
    monkeypatch.setattr(activation_offloading, "MIN_BYTES", 2**12)
    monkeypatch.setattr(memory_report, "device_memory", lambda trainer: 10**9)
    monkeypatch.setattr(memory_report, "machine_memory", lambda: 10**9)
    printed = dry_run("--data.max_length=128")
    for option in ("--model.activation_offloading true", "--trainer.strategy.cpu_offload true"):
        saved = re.search(rf"{option} [^(]*\((-\d+)%\)", printed)
        assert saved is not None, printed
    assert "host memory" not in printed
    printed = dry_run("--data.max_length=128", "--activation_offloading", *OFFLOAD)
    assert "weights, gradients and the optimiser's state and activations on the host" in printed
    assert re.search(r"host memory of 2 processes, each: weights [\d.]+, gradients [\d.]+, optimiser state", printed)
    assert "On the host, each machine needs" in printed
    assert "--model.activation_offloading true" not in printed
    assert "cpu_offload true" not in printed
