"""Short spellings of options, as other trainers have them.

They are only for the command line; files name options in full.
"""

from __future__ import annotations

from collections.abc import Sequence

from bdpo_pl.errors import InputError

SHORT = {
    "model_name_or_path": "model.policy",
    "dataset": "data.train",
    "dataset_name": "data.train",
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
    "lr_scheduler_type": "model.lr_schedule",
    "warmup_ratio": "model.warmup_ratio",
    "gradient_checkpointing": "model.gradient_checkpointing",
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
    "devices": "trainer.devices",
    "num_nodes": "trainer.num_nodes",
    "strategy": "trainer.strategy",
    "logging_steps": "trainer.log_every_n_steps",
    "output_dir": "trainer.default_root_dir",
    "out_dir": "trainer.default_root_dir",
    "seed": "seed_everything",
    "resume_from_checkpoint": "ckpt_path",
}
"""Options with the same value, by short spelling."""

CHOSEN = {
    "report_to": (
        "trainer.logger",
        {
            "csv": "lightning.pytorch.loggers.CSVLogger",
            "tensorboard": "lightning.pytorch.loggers.TensorBoardLogger",
            "wandb": "lightning.pytorch.loggers.WandbLogger",
            "mlflow": "lightning.pytorch.loggers.MLFlowLogger",
            "none": "false",
        },
    ),
    "loss_type": (
        "model.loss",
        {
            "bdpo": "BalancedDPOLoss",
            "dpo": "DPOLoss",
            "sigmoid": "DPOLoss",
            "ipo": "IPOLoss",
            "cpo": "CPOLoss",
            "simpo": "SimPOLoss",
        },
    ),
    "bf16": ("trainer.precision", {"true": "bf16-mixed", "false": "32-true"}),
    "fp16": ("trainer.precision", {"true": "16-mixed", "false": "32-true"}),
}
"""Options, and their values by the names used elsewhere, by short spelling."""

_CLASSES = ("model.loss", "model.optimizer")


def in_full(args: Sequence[str]) -> list[str]:
    """Return `args` with full names for short spellings.

    A class is put before its own options, wherever it was: the parser forgets options given before their class.

    Raises:
        InputError: a value is unknown to its short spelling.
    """
    written: list[str] = []
    rest = list(args)
    while rest:
        name, has_value, value = rest.pop(0).partition("=")
        short = name.removeprefix("--")
        if name.startswith("--") and short in CHOSEN:
            option, values = CHOSEN[short]
            if not has_value:
                # A switch without a value is on.
                value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
            if value.lower() not in values:
                raise InputError(f"--{short} is one of {', '.join(values)}, got {value}")
            written.append(f"--{option}={values[value.lower()]}")
        elif name.startswith("--") and short in SHORT:
            written.append(f"--{SHORT[short]}{has_value}{value}")
        else:
            written.append(name + has_value + value)
    return _classes_first(written)


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
