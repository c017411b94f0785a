"""The plan of memory for people."""

import re

import pytest

from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.training import memory_report
from bdpo_pl.training.memory_plan import planned
from bdpo_pl.training.memory_report import WarnsOfMemory, largest_batch, verdict
from bdpo_pl.training.planned_batches import longest_batch


def test_largest_batch_is_a_power_of_two_that_fits():
    # 90 of 100 bytes may be used.
    assert largest_batch(lambda pairs: 11 * pairs, 100) == 8
    assert largest_batch(lambda pairs: 46 * pairs, 100) == 1
    assert largest_batch(lambda pairs: 91 * pairs, 100) is None
    assert largest_batch(lambda pairs: 1, 100) == 64


def test_verdict_names_both_sides():
    assert verdict(20 * 10**9, 16 * 10**9) == "The peak of 20.0 GB does not fit into a device of 16.0 GB (125%)."
    assert "fits into a device" in verdict(10 * 10**9, 16 * 10**9)


def test_longest_pairs_count():
    table = PairTable.from_pairs([PreferencePair([2] * p, [3] * c, [4] * r) for p, c, r in ((1, 1, 1), (5, 4, 2))], [1])
    shared, split = longest_batch(table, 1, True), longest_batch(table, 1, False)
    assert shared.input_ids.shape == (1, 5 + 4 + 2)
    assert split.input_ids.shape == (2, 9)


@pytest.fixture
def dry_run(model_dir, preference_file, tmp_path, monkeypatch, capsys):
    def run(*options):
        from bdpo_pl.fit import main

        monkeypatch.chdir(tmp_path)
        main([f"--model.policy={model_dir}", "--trainer.accelerator=cpu", "--dry_run=true", *options])
        return " ".join(capsys.readouterr().out.split())

    return run


def test_dry_run_reads_the_lengths_and_says_what_would_help(dry_run, preference_file, monkeypatch):
    monkeypatch.setattr(memory_report, "device_memory", lambda trainer: 2_500_000)
    printed = dry_run(f"--data.train={preference_file}", "--data.batch_size=16")
    assert re.search(r"a micro-batch of 16 pairs from the longest of 38 training pairs", printed)
    assert "does not fit into a device of 2.5 MB" in printed
    batch = re.search(r"--data.batch_size (\d+) --trainer.accumulate_grad_batches (\d+): the largest that", printed)
    assert int(batch[1]) * int(batch[2]) == 16
    assert "--model.gradient_checkpointing true" in printed
    assert "--model.lora.r 16" in printed


def test_dry_run_without_data_says_what_it_assumes(dry_run):
    printed = dry_run()
    assert "Assumed: a micro-batch of 8 pairs that all fill the window" in printed


def test_run_that_will_not_fit_warns_before_it_scores(job, monkeypatch, recwarn):
    monkeypatch.setattr(memory_report, "device_memory", lambda trainer: 500_000)
    trainer, module, data = job(trainer={"max_steps": 1, "callbacks": [WarnsOfMemory()]})
    trainer.fit(module, data)
    warned = [str(warning.message) for warning in recwarn if "this run will need" in str(warning.message)]
    assert len(warned) == 1
    assert "on a device of 500.0 kB" in warned[0]
    plan = planned(trainer, module, data, longest=data.tables["train"])
    assert plan.peak < planned(trainer, module, data).peak
