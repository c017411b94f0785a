"""The plan of memory for people."""

import re
from types import SimpleNamespace

import pytest

from bdpo_pl.data.samplers import TokenBatchSampler
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PreferencePair
from bdpo_pl.errors import InputError
from bdpo_pl.training import memory_plan, memory_report
from bdpo_pl.training.memory_plan import planned
from bdpo_pl.training.memory_report import WarnsOfMemory, alternatives, largest_batch, verdict
from bdpo_pl.training.planned_batches import longest_batch


def test_largest_batch_is_the_last_that_fits():
    # 90 of 100 bytes may be used.
    assert largest_batch(lambda pairs: 11 * pairs, 100, [1, 2, 4, 8, 16]) == 8
    assert largest_batch(lambda pairs: 46 * pairs, 100, [1, 2]) == 1
    assert largest_batch(lambda pairs: 91 * pairs, 100, [1, 2]) is None
    assert largest_batch(lambda pairs: 1, 100, [1, 64]) == 64


@pytest.mark.parametrize(
    ("pairs", "summed", "fit", "options"),
    [
        (16, 1, 4, ["--data.batch_size 4 --trainer.accumulate_grad_batches 4: the largest that fits",
                    "--data.batch_size 8 --trainer.accumulate_grad_batches 2"]),
        (4, 8, 2, ["--data.batch_size 2 --trainer.accumulate_grad_batches 16: the largest that fits",
                   "--data.batch_size 2 --trainer.accumulate_grad_batches 16"]),
        (4, 8, 9, ["--data.batch_size 8 --trainer.accumulate_grad_batches 4: the largest that fits",
                   "--data.batch_size 2 --trainer.accumulate_grad_batches 16"]),
        (6, 1, 5, ["--data.batch_size 3 --trainer.accumulate_grad_batches 2: the largest that fits",
                   "--data.batch_size 3 --trainer.accumulate_grad_batches 2"]),
        (7, 1, 7, ["--data.batch_size 1 --trainer.accumulate_grad_batches 7"]),
        (2, 1, 8, ["--data.batch_size 8: the largest that fits",
                   "--data.batch_size 1 --trainer.accumulate_grad_batches 2"]),
    ],
)  # fmt: skip
def test_other_batches_leave_as_many_pairs_to_a_step(job, monkeypatch, pairs, summed, fit, options):
    trainer, module, data = job(data={"batch_size": pairs}, trainer={"accumulate_grad_batches": summed})
    monkeypatch.setattr(memory_report, "planned", lambda *_, pairs=fit, **__: SimpleNamespace(peak=100 * pairs))
    found = [option for option, _ in alternatives(trainer, module, data, None, 112 * fit)]
    assert [option for option in found if "batch_size" in option] == options


def test_an_option_without_a_plan_has_an_unknown_peak_and_a_refused_one_is_left_out(job, monkeypatch):
    def planned(*_, lora=None, gradient_checkpointing=False, **__):
        if lora is not None:
            raise InputError("no such layers")
        if gradient_checkpointing:
            raise RuntimeError("no values")
        return SimpleNamespace(peak=1)

    monkeypatch.setattr(memory_report, "planned", planned)
    found = dict(alternatives(*job(), None, None))
    assert found["--model.gradient_checkpointing true"] is None
    assert not [option for option in found if "lora" in option]


def test_verdict_names_both_sides():
    assert verdict(20 * 10**9, 16 * 10**9) == "The peak of 20.0 GB does not fit into a device of 16.0 GB (125%)."
    assert "fits into a device" in verdict(10 * 10**9, 16 * 10**9)


def test_longest_pairs_count():
    table = PairTable.from_pairs([PreferencePair([2] * p, [3] * c, [4] * r) for p, c, r in ((1, 1, 1), (5, 4, 2))], [1])
    shared, split = longest_batch(table, 1, True), longest_batch(table, 1, False)
    assert shared.input_ids.shape == (1, 5 + 4 + 2)
    assert split.input_ids.shape == (2, 9)


@pytest.mark.parametrize("sharing", ["auto", "never"])
@pytest.mark.parametrize(
    "lengths", [[(90, 10, 10)] * 40, [(5, 90, 80)] * 40, [(600, 90, 10), *[(10, 12, 10)] * 200], [(90, 10, 10)] * 3]
)
def test_a_batch_by_tokens_is_planned_as_large_as_the_largest_of_a_run(job, monkeypatch, lengths, sharing):
    trainer, module, data = job(data={"max_tokens_per_batch": 1640}, prefix_sharing=sharing)
    table = PairTable.from_pairs([PreferencePair([2] * p, [3] * c, [4] * r) for p, c, r in lengths], [1])
    batches = []
    plan = memory_plan.plan_memory
    monkeypatch.setattr(memory_plan, "plan_memory", lambda *given, **o: batches.append(given[2]) or plan(*given, **o))
    planned(trainer, module, data, longest=table)
    sizes = table.num_tokens(shared=sharing == "auto")
    largest = max(sum(sizes[i] for i, _ in batch) for batch in TokenBatchSampler(sizes, 1640, epoch=lambda: 0))
    assert largest <= batches[0].num_tokens < 1640 + sizes.max()


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


def test_dry_run_of_an_architecture_without_a_plan_says_so(dry_run, monkeypatch, capsys):
    def refuse(*_, **__):
        raise NotImplementedError("no meta kernel\nand more")

    monkeypatch.setattr(memory_report, "planned", refuse)
    with pytest.raises(SystemExit) as stopped:
        dry_run()
    assert stopped.value.code == 2
    assert "(NotImplementedError: no meta kernel); leave out --dry_run" in " ".join(capsys.readouterr().err.split())


def test_dry_run_without_data_says_what_it_assumes(dry_run):
    printed = dry_run()
    assert "Assumed: a micro-batch of 8 pairs that all fill the window" in printed


def test_run_that_will_not_fit_warns_before_it_scores(job, monkeypatch, recwarn):
    monkeypatch.setattr(memory_report, "device_memory", lambda trainer: 500_000)
    trainer, module, data = job(trainer={"max_steps": 1, "callbacks": [WarnsOfMemory()]})
    trainer.fit(module, data)
    warned = [str(warning.message) for warning in recwarn if "this run will need" in str(warning.message)]
    assert len(warned) == 1
    assert "on a device of 500.0 kB: lower data.batch_size" in warned[0]
    data.max_tokens_per_batch = 4096
    trainer.callbacks[-1].setup(trainer, module, "fit")
    assert "500.0 kB: lower data.max_tokens_per_batch" in str(recwarn.list[-1].message)
    data.max_tokens_per_batch = None
    monkeypatch.setattr(memory_report, "planned", lambda *_, **__: 1 / 0)
    trainer.callbacks[-1].setup(trainer, module, "fit")
    assert any("there is no memory plan for" in str(warning.message) for warning in recwarn)
    plan = planned(trainer, module, data, longest=data.tables["train"])
    assert plan.peak < planned(trainer, module, data).peak
