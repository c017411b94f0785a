"""Short spellings of options, as other trainers have them.

They are only for the command line; files name options in full.
"""

from __future__ import annotations

from collections.abc import Sequence

from bdpo_pl.errors import InputError

SHORT = {
    "model_name_or_path": "model.policy",
    "model_revision": "model.revision",
    "dtype": "model.dtype",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "dataset_config": "data.subset",
    "dataset_train_split": "data.split",
    "dataset_test_split": "data.held_out_split",
    "dataloader_num_workers": "data.num_workers",
    "max_length": "data.max_length",
    "batch_size": "data.batch_size",
    "per_device_train_batch_size": "data.batch_size",
    "per_device_eval_batch_size": "data.eval_batch_size",
    "beta": "model.loss.beta",
    "tau": "model.loss.tau",
    "label_smoothing": "model.loss.label_smoothing",
    "learning_rate": "model.optimizer.lr",
    "lr": "model.optimizer.lr",
    "weight_decay": "model.optimizer.weight_decay",
    "adam_epsilon": "model.optimizer.eps",
    "lr_scheduler_type": "model.lr_schedule",
    "warmup_ratio": "model.warmup_ratio",
    "warmup_steps": "model.warmup_ratio",
    "router_aux_loss_coef": "model.router_aux_loss",
    "torch_compile_backend": "model.compile",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "activation_offloading": "model.activation_offloading",
    "attn_implementation": "model.attn_implementation",
    "trust_remote_code": "model.trust_remote_code",
    "ref_model_sync_steps": "model.reference_sync.every",
    "ref_model_mixup_alpha": "model.reference_sync.mixup",
    "lora_r": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target_modules": "model.lora.target_modules",
    "lora_target_parameters": "model.lora.target_parameters",
    "lora_modules_to_save": "model.lora.modules_to_save",
    "use_rslora": "model.lora.rslora",
    "use_dora": "model.lora.dora",
    "max_steps": "trainer.max_steps",
    "num_train_epochs": "trainer.max_epochs",
    "epochs": "trainer.max_epochs",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "max_grad_norm": "trainer.gradient_clip_val",
    "precision": "trainer.precision",
    "full_determinism": "trainer.deterministic",
    "devices": "trainer.devices",
    "num_processes": "trainer.devices",
    "num_nodes": "trainer.num_nodes",
    "strategy": "trainer.strategy",
    "logging_steps": "trainer.log_every_n_steps",
    "output_dir": "trainer.default_root_dir",
    "out_dir": "trainer.default_root_dir",
    "seed": "seed_everything",
    "resume_from_checkpoint": "ckpt_path",
}
"""Options with the same value, by short spelling."""

_LOGGERS = (
    "trainer.logger",
    {
        "csv": "lightning.pytorch.loggers.CSVLogger",
        "tensorboard": "lightning.pytorch.loggers.TensorBoardLogger",
        "wandb": "lightning.pytorch.loggers.WandbLogger",
        "mlflow": "lightning.pytorch.loggers.MLFlowLogger",
        "trackio": "bdpo_pl.training.trackio_logger.TrackioLogger",
        "none": "false",
    },
)
CHOSEN = {
    "report_to": _LOGGERS,
    "logger": _LOGGERS,
    "loss_type": (
        "model.loss",
        {
            "bdpo": "BalancedDPOLoss",
            "dpo": "DPOLoss",
            "sigmoid": "DPOLoss",
            "ipo": "IPOLoss",
            "cpo": "CPOLoss",
            "simpo": "SimPOLoss",
            "hinge": "HingeLoss",
            "robust": "RobustDPOLoss",
            "apo_zero": "APOZeroLoss",
            "apo_down": "APODownLoss",
            "sigmoid_norm": "SigmoidNormLoss",
            "sft": "SFTLoss",
        },
    ),
    "optim": (
        "model.optimizer",
        {
            "adamw_torch_fused": "bdpo_pl.training.optim.AdamW",
            "adamw_torch": "bdpo_pl.training.optim.AdamW",
            "adafactor": "bdpo_pl.training.adafactor.Adafactor",
            "muon": "bdpo_pl.training.optimizers.Muon",
            "adamw_8bit": "bdpo_pl.training.optimizers.AdamW8bit",
            "adamw_bnb_8bit": "bdpo_pl.training.optimizers.AdamW8bit",
            "paged_adamw_8bit": "bdpo_pl.training.optimizers.PagedAdamW8bit",
            "schedule_free_adamw": "bdpo_pl.training.schedule_free.ScheduleFreeAdamW",
            "sgd": "torch.optim.SGD",
            "rmsprop": "torch.optim.RMSprop",
        },
    ),
    "precompute_ref_log_probs": ("model.reference_mode", {"true": "precomputed", "false": "live"}),
    "no_gradient_checkpointing": ("model.gradient_checkpointing", {"true": "false"}),
    "torch_compile": ("model.compile", {"true": "inductor", "false": "null"}),
    "load_in_4bit": ("model.lora.quantize", {"true": "nf4", "false": "none"}),
    "load_best_model_at_end": ("export_from", {"true": "best", "false": "last"}),
    "greater_is_better": ("checkpoint.mode", {"true": "max", "false": "min"}),
    "use_cpu": ("trainer.accelerator", {"true": "cpu", "false": "auto"}),
    "bf16": ("trainer.precision", {"true": "bf16-mixed", "false": "32-true"}),
    "fp16": ("trainer.precision", {"true": "16-mixed", "false": "32-true"}),
}
"""Options, and their values by the names used elsewhere, by short spelling."""

SWITCHES = frozenset({
    "gradient_checkpointing", "activation_offloading", "trust_remote_code", "use_rslora", "use_dora",
    "full_determinism",
})  # fmt: skip
"""Short spellings that are true where no value follows them."""

_CLASSES = ("model.loss", "model.optimizer")
_ADAPTERS = ("--lora_", "--model.lora")
_ADAPTER_SWITCHES = ("--use_dora", "--use_rslora", "--load_in_4bit")
_EPOCHS = {"--trainer.max_epochs", *(f"--{name}" for name in SHORT if SHORT[name] == "trainer.max_epochs")}


def in_full(args: Sequence[str]) -> list[str]:
    """Return `args` with full names for short spellings.

    A class is put before its own options, wherever it was: the parser forgets options given before their class.

    Raises:
        InputError: a value is unknown to its short spelling.
    """
    written: list[str] = []
    rest = _with_steps_alone(_without_doubles(args))
    while rest:
        name, has_value, value = rest.pop(0).partition("=")
        short = name.removeprefix("--")
        if name.startswith("--") and short in CHOSEN | dict.fromkeys(SWITCHES) and not has_value:
            # A switch without a value is on.
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        if name.startswith("--") and short in CHOSEN:
            option, values = CHOSEN[short]
            if value.lower() not in values:
                raise InputError(f"--{short} is one of {', '.join(values)}, got {value}")
            written.append(f"--{option}={values[value.lower()]}")
        elif name.startswith("--") and short in SHORT:
            written.append(f"--{SHORT[short]}{'=' if short in SWITCHES else has_value}{value}")
        else:
            written.append(name + has_value + value)
    return _classes_first(written)


def _without_doubles(args: Sequence[str]) -> list[str]:
    """Return `args` without those of TRL that only repeat another one.

    These are `--use_peft` beside options of the adapters, of `--bf16` and `--fp16` the one that is off, and switches of
    the adapters that are off where nothing else asks for adapters.

    Raises:
        InputError: `--use_peft` stands alone.
    """
    left = list(args)
    _leave_out_adapters_that_are_off(left)
    switches = {name: _switch(left, name)[0] for name in ("--use_peft", "--bf16", "--fp16")}
    if "true" in switches.values():
        for name in ("--bf16", "--fp16"):
            if switches[name] == "false":
                del left[_switch(left, name)[1]]
    if switches["--use_peft"] is not None:
        if switches["--use_peft"] != "true" or not _asks_for_adapters(left):
            raise InputError(
                "--use_peft says that there are adapters, and here an option of theirs says so: --lora_r 16 (TRL's "
                "default, with --lora_alpha 32 and --lora_dropout 0.05); leave --use_peft false out"
            )
        del left[_switch(left, "--use_peft")[1]]
    return left


def _asks_for_adapters(args: Sequence[str]) -> bool:
    return any(arg.startswith(_ADAPTERS) for arg in args) or any(
        _switch(args, name)[0] not in (None, "false") for name in _ADAPTER_SWITCHES
    )


def _leave_out_adapters_that_are_off(args: list[str]) -> None:
    """Delete the switches of adapters that are off, as they are in TRL: one alone would make adapters.

    Raises:
        InputError: there is a file of options, which may have adapters that the switch is about.
    """
    if _asks_for_adapters(args):
        return
    for name in _ADAPTER_SWITCHES:
        while _switch(args, name)[0] is not None:
            if any(arg.partition("=")[0] in ("--config", "-c") for arg in args):
                option = SHORT.get(name[2:]) or CHOSEN[name[2:]][0]
                off = "none" if name == "--load_in_4bit" else "false"
                raise InputError(
                    f"{name} false beside --config is not clear: if the file has adapters, write --{option}={off}; "
                    "else leave it out, because an option of the adapters makes some"
                )
            del args[_switch(args, name)[1]]


def _with_steps_alone(args: list[str]) -> list[str]:
    """Return `args` with as many epochs as `--max_steps` takes, where no option says how many: so TRL has it."""
    steps, _ = _switch(args, "--max_steps")
    if steps is None or not steps.isdecimal() or any(arg.partition("=")[0] in _EPOCHS for arg in args):
        return args
    return [*args, "--trainer.max_epochs=-1"]


def _switch(args: Sequence[str], name: str) -> tuple[str | None, slice]:
    """Return the value of a switch in lower case, `true` where it stands alone, and its place; None if it is absent."""
    for i, arg in enumerate(args):
        given, has_value, value = arg.partition("=")
        if given == name:
            follows = not has_value and i + 1 < len(args) and not args[i + 1].startswith("--")
            return (args[i + 1] if follows else value or "true").lower(), slice(i, i + 1 + follows)
    return None, slice(0)


def _classes_first(args: list[str]) -> list[str]:
    for option in _CLASSES:
        named = [i for i, arg in enumerate(args) if arg == f"--{option}" or arg.startswith(f"--{option}=")]
        own = [
            i for i, arg in enumerate(args) if arg.startswith(f"--{option}.") and not arg.startswith(f"--{option}.help")
        ]
        if named and own and own[0] < named[-1]:
            at = named[-1]
            moved = args[at : at + (1 if "=" in args[at] else 2)]
            del args[at : at + len(moved)]
            args[own[0] : own[0]] = moved
    return args
