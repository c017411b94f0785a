"""What a run refuses at its start, before anything is read, and its dry run in the same words."""

import lightning as L
import pytest

from bdpo_pl.fit import main

TWO = ["--trainer.devices=2", "--trainer.strategy=fsdp2"]
GROUPS = ["--trainer.devices=2", "--trainer.strategy=bdpo_pl.parallel.fsdp2.ShardedStrategy"]
SCHEDULE_FREE = "--model.optimizer=bdpo_pl.training.schedule_free.ScheduleFreeAdamW"

REFUSED = {
    "a run without an end": (["--trainer.max_epochs=-1"], "does not end the run either"),
    "quantised weights are split": (
        [*TWO, "--model.lora.quantize=nf4"],
        "quantised weights are not split by ShardedStrategy; set it to none, or trainer.strategy to ddp",
    ),
    "adapters of shared layers": (
        [*GROUPS, "--trainer.strategy.tensor_parallel_size=2", "--model.lora.r=4"],
        "model.lora works with FSDP2, not with tensor parallelism; set tensor_parallel_size to 1",
    ),
    "groups of no whole size": (
        [*GROUPS, "--trainer.strategy.tensor_parallel_size=3"],
        "tensor_parallel_size is 3, which does not divide the 2 devices; set it to a divisor of them, or to 1",
    ),
    "rows shared by no whole group": (
        [*GROUPS, "--trainer.strategy.context_parallel_size=3"],
        "context_parallel_size is 3, which does not divide the 2 devices; set it to a divisor of them, or to 1",
    ),
    "other groups than the devices make": (
        [*GROUPS, "--trainer.strategy.data_parallel_size=3"],
        "data_parallel_size is 3, but 2 devices in groups of 1 make 2; leave it out",
    ),
    "compiled layers read shared rows": (
        [*GROUPS, "--trainer.strategy.context_parallel_size=2", "--model.compile=eager"],
        "model.compile does not work with trainer.strategy.context_parallel_size 2",
    ),
    "a live reference of adapters is split": (
        [*TWO, "--model.lora.r=4", "--model.reference_mode=live"],
        "which this strategy splits; set it to precomputed",
    ),
    "a policy that moves is split": (
        [*TWO, "--model.loss=bdpo_pl.losses.DPOLoss", "--model.reference_sync.every=2"],
        "model.reference_sync needs the whole policy on each device",
    ),
    "comprehension of a split policy": ([*TWO, "--model.reestimate_every=2"], "needs the whole policy on each device"),
    "a file that has no parts": (
        [*TWO, "--model.reference=other.gguf"],
        "is a GGUF file, which cannot be read in p",
    ),
    "an optimiser of whole weights": (
        [*GROUPS, "--trainer.strategy.tensor_parallel_size=2", SCHEDULE_FREE, "--model.lr_schedule=constant"],
        "set tensor_parallel_size to 1: take AdamW",
    ),
    "a falling rate": ([SCHEDULE_FREE], "but model.lr_schedule is cosine: set it to constant"),
    "an unknown backend": (["--model.compile=fastest"], "model.compile: there is no backend 'fastest'"),
    "more tokens than positions": (["--data.max_length=100000"], "lower data.max_length"),
    "a router that is not there": (["--model.router_aux_loss=0.1"], "has no router that is trained with an auxiliary"),
    "no reference": (["--model.reference_mode=none"], "BalancedDPOLoss needs a reference model"),
    "no comprehension": (["--model.scoring.comprehension=false"], "BalancedDPOLoss needs comprehension"),
    "no comprehension to measure again": (
        ["--model.loss=bdpo_pl.losses.DPOLoss", "--model.reestimate_every=2"],
        "as configured reads no comprehension; remove the option",
    ),
    "a reference in another dtype than its adapters": (
        ["--model.lora.r=4", "--model.reference_dtype=bfloat16"],
        "in the policy's own dtype; leave it out",
    ),
    "an average of no weights": (
        ["--trainer.callbacks=[{class_path: StochasticWeightAveraging, init_args: {swa_lrs: 0.1}}]"],
        "the callback StochasticWeightAveraging copies the module before the policy is loaded",
    ),
    "a size found too late": (["--trainer.callbacks=BatchSizeFinder"], "set data.batch_size, and see with --dry_run"),
    "a rate that is not the module's": (["--trainer.callbacks=LearningRateFinder"], "set model.optimizer.lr"),
    "steps of different sizes": (
        ["--trainer.callbacks=[{class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 2}}}]"],
        "set trainer.accumulate_grad_batches",
    ),
    "fewer epochs than the least": (["--trainer.min_epochs=3"], "min_epochs is 3, but the run ends after 1"),
    "fewer steps than the least": (
        ["--trainer.min_steps=9", "--trainer.max_steps=8"],
        "min_steps is 9, but the run ends after 8",
    ),
    "clocks of several ranks": (
        ["--trainer.devices=2", "--trainer.val_check_interval=00:00:10:00"],
        "which each rank would take from its own clock",
    ),
    "the worst checkpoint": (
        ["--checkpoint.monitor=held_out/accuracy"],
        "checkpoint.mode is min, by which held_out/accuracy would choose the worst; set checkpoint.mode max",
    ),
    "the largest gap": (["--checkpoint.monitor=gap/margin", "--checkpoint.mode=max"], "set checkpoint.mode min"),
    "a stop for being better": (
        [
            "--trainer.callbacks=[{class_path: EarlyStopping, init_args: {monitor: held_out/hh/margin}}]",
            "--data.held_out={hh: embedded, pku: embedded}",
        ],
        "EarlyStopping has mode min, by which held_out/hh/margin would stop the run as it gets better",
    ),
    "a stop by what is not logged": (
        ["--trainer.callbacks=[{class_path: EarlyStopping, init_args: {monitor: held_out/los}}]"],
        "the monitor of EarlyStopping is held_out/los, which this run never logs; did you mean held_out/loss",
    ),
    "a stop by what is not measured": (
        [
            "--trainer.callbacks=[{class_path: EarlyStopping, init_args: {monitor: held_out/loss}}]",
            "--trainer.limit_val_batches=0",
        ],
        "which validations measure, and there are none: leave out trainer.limit_val_batches 0",
    ),
    "two writers of last.ckpt": (
        ["--checkpoint.save_last=true"],
        "checkpoint.save_last would write other content into",
    ),
    "another last.ckpt": (["--checkpoint.filename=last"], "checkpoint.filename last would write other content into"),
    "weights by the loss of others": (
        ["--checkpoint.every_n_train_steps=3"],
        "checkpoint.every_n_train_steps would choose between weights by the held_out/loss of earlier ones",
    ),
    "weights of a time by the loss of others": (
        ["--checkpoint.train_time_interval=00:01:00:00"],
        "checkpoint.train_time_interval would choose between weights",
    ),
    "a checkpoint after the last epoch": (["--checkpoint.every_n_epochs=5"], "so no checkpoint would be kept"),
    "no checkpoints at all": (["--trainer.enable_checkpointing=false"], "save_top_k 0 keeps no other checkpoint"),
    "a bare run": (["--trainer.barebones=true"], "for a quick trial there is trainer.fast_dev_run"),
    "a gap that is never measured": (
        ["--trainer.limit_val_batches=0", "--stop_at_gap=0.5"],
        "stop_at_gap needs a validation, and the run would have none: leave out trainer.limit_val_batches 0",
    ),
    "a validation after the last epoch": (
        ["--trainer.check_val_every_n_epoch=2", "--export_from=best"],
        "lower trainer.check_val_every_n_epoch 2 to at most trainer.max_epochs 1",
    ),
    "the best of a trial": (
        ["--trainer.fast_dev_run=2", "--export_from=best"],
        "trainer.fast_dev_run keeps no checkpoint: leave out one of them",
    ),
    "batches of no test": (["--trainer.limit_test_batches=2"], "it would have no effect: nothing is tested here"),
}


@pytest.fixture
def printed(model_dir, tmp_path, monkeypatch, capsys):
    """What `fit` prints before it ends with an error, while it reads no pair."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bdpo_pl.training.datamodule.load_pairs", lambda *_, **__: pytest.fail("pairs were read"))

    def set_up_alone(trainer, module, data, **_):
        # Processes are not started: each would refuse the same.
        trainer._data_connector.attach_datamodule(module, data)
        module.trainer = trainer
        module.setup("fit")

    monkeypatch.setattr(L.Trainer, "fit", set_up_alone)

    def run(*options):
        given = [f"--model.policy={model_dir}", "--data.train=embedded", "--trainer.accelerator=cpu", *options]
        with pytest.raises(SystemExit) as ended:
            main(given)
        assert ended.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    return run


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED)
def test_a_dry_run_refuses_what_the_run_refuses_and_in_its_words(printed, options, said):
    planned = printed("--dry_run=true", *options)
    assert said in planned
    assert printed(*options) == planned


def test_no_option_is_recommended_that_the_run_would_refuse(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [f"--model.policy={model_dir}", "--trainer.accelerator=cpu", "--dry_run=true", *TWO]
    main([*given, "--data.max_length=64"])
    assert "--model.lora.r 16" in capsys.readouterr().out
    main([*given, *GROUPS, "--data.max_length=64", "--trainer.strategy.tensor_parallel_size=2"])
    assert "--model.lora.r 16" not in capsys.readouterr().out
