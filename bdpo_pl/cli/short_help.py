"""The help that fits on one screen: the most used options, with the defaults for a user's own model."""

from __future__ import annotations

import textwrap
from typing import NamedTuple

_WIDTH = 100
_COLUMN = 34


class Option(NamedTuple):
    """One line of the help.

    Attributes:
        name: full name of the option, without dashes.
        short: short spelling, if there is one.
        default: default value, as text.
        help: description of the option.
    """

    name: str
    short: str
    default: str
    help: str


_JOB = {
    "Model and data": (
        Option("model.policy", "", "", "model to align: folder in the Hugging Face layout, or hub name"),
        Option("data.train", "", "", "pairs: JSONL, Parquet, folder or hub dataset with prompt, chosen, rejected"),
        Option("data.held_out", "", "a part of data.train", "pairs that are not trained on, to measure overfitting"),
        Option("data.held_out_fraction", "", "0.05", "share of data.train that is held out"),
        Option(
            "data.max_length", "max_length", "1024, or the model's", "maximum number of tokens of prompt + response"
        ),
        Option("data.load.columns", "", "{}", "our name: your column, as in '{chosen: good_answer}'"),
        Option("config", "", "", "YAML file with any of these options; configs/ has examples"),
    ),
    "Method": (
        Option(
            "model.loss", "loss_type", "BalancedDPOLoss", "loss: DPOLoss, IPOLoss, CPOLoss, SimPOLoss, SafeDPOLoss, …"
        ),
        Option("model.loss.beta", "beta", "0.1", "β; larger values keep the policy closer to its reference"),
        Option("model.loss.tau", "tau", "0.25 for pmi", "imbalance at which the weights are e : 1; auto: its spread"),
        Option("model.lora.r", "lora_r", "off", "rank of LoRA adapters to train; raise the learning rate ten times"),
    ),
    "Training": (
        Option("model.optimizer.lr", "learning_rate", "1e-06", "learning rate of AdamW"),
        Option("model.lr_schedule", "lr_scheduler_type", "cosine", "schedule of the rate: cosine, linear or constant"),
        Option(
            "model.warmup_ratio", "warmup_ratio", "0.1", "share of all steps in which the learning rate is warmed up"
        ),
        Option("trainer.max_epochs", "num_train_epochs", "1", "passes over the data"),
        Option(
            "trainer.max_steps",
            "max_steps",
            "-1",
            "maximum number of optimiser steps; -1: no limit but the epochs. The short spelling also lifts that of "
            "the epochs, unless an option sets it",
        ),
        Option("data.batch_size", "per_device_train_batch_size", "8", "pairs in a micro-batch on each device"),
        Option("trainer.accumulate_grad_batches", "gradient_accumulation_steps", "1", "micro-batches in a step"),
        Option("trainer.val_check_interval", "", "each epoch", "share of an epoch, or batches, between validations"),
        Option("seed_everything", "seed", "42", "seed of all random numbers"),
    ),
    "Machine": (
        Option("trainer.precision", "precision", "32-true", "precision; bf16-mixed is suited to a GPU"),
        Option("trainer.devices", "devices", "auto", "number of devices, with trainer.strategy (auto, ddp, fsdp2)"),
        Option(
            "model.gradient_checkpointing",
            "gradient_checkpointing",
            "false",
            "recompute activations: less memory, a third more time",
        ),
        Option("dry_run", "", "false", "print the memory that the run needs, and do nothing else"),
    ),
    "Safety, and what is written": (
        Option("safety.harmful", "", "none", "prompts to refuse, before and after training: a file or a suite"),
        Option("safety.benign", "", "none", "prompts to answer, in the same forms; see also safety.jailbreak"),
        Option("completions.num_prompts", "", "0", "held-out prompts that the policy completes at each validation"),
        Option("trainer.default_root_dir", "output_dir", "runs", "folder of all runs"),
        Option("trainer.logger", "report_to", "csv", "logger: csv, tensorboard, wandb, mlflow, trackio or none"),
        Option("export_from", "", "last", "weights to export: last or best"),
        Option("ckpt_path", "", "", "checkpoint to resume from; last: the newest; auto: that, if any"),
    ),
}
_DIAGNOSE = {
    "Model and data": _JOB["Model and data"],
    "Method": _JOB["Method"][1:3],
    "The report": (
        Option("diagnose.folder", "", "runs/diagnosis", "folder of the report"),
        Option("diagnose.strong_ratio", "", "1.5", "minimum ratio of weights in a strongly re-weighted pair"),
        Option("diagnose.extremes", "", "10", "pairs listed at each end of the imbalance"),
        Option("diagnose.show_texts", "", "false", "put their texts into the report, with a warning"),
    ),
}
_EVALUATE = {
    "Prompts": (
        Option("suites", "", "the small ones of bdpo_pl", "suites of prompts: NAME=FILE,… ; see --list_suites true"),
        Option("max_prompts", "", "all", "maximum number of prompts of each suite"),
        Option("attacks.framings", "", "none", "jailbreak framings by name, or all"),
        Option("generation.max_new_tokens", "", "64", "maximum tokens of an answer; a judge of harm needs 256"),
        Option("generation.batch_size", "", "64", "prompts answered at a time"),
    ),
    "Judge": (
        Option(
            "judge.kind",
            "",
            "phrases",
            "phrases (refusals, not harm), learned, classifier, llama_guard, wildguard, harmbench, chat, …",
        ),
        Option("judge.model", "", "", "model of the judge"),
        Option("labels", "", "", "labelled answers, to measure the judge's errors"),
    ),
    "Further measures": (
        Option("pairs.train", "", "none", "training pairs; with pairs.held_out, the gap between them is measured"),
        Option("ability.lm_eval", "", "none", "tasks of lm-evaluation-harness"),
    ),
    "What is written": (
        Option("folder", "", "runs/evaluation", "folder of report, numbers and verdicts"),
        Option("keep_answers", "", "false", "save the answers with the verdicts, so that another judge can read them"),
        Option("show_texts", "", "false", "put the texts of failures into the report, with a warning"),
        Option("refine", "", "", "file to write with failed prompts, as pairs that lack only `chosen`"),
    ),
    "Machine": (
        Option("dtype", "", "auto", "dtype of the weights: float32, bfloat16 or float16"),
        Option("device", "", "auto", "device: cpu, cuda or cuda:N"),
        Option("devices", "", "1", "number of devices that answer, each with the whole model; auto: all GPUs"),
        Option("config", "", "", "YAML file with any of these options, and models"),
    ),
}
SHORT_HELP = {"fit": _JOB, "diagnose": _DIAGNOSE, "evaluate": _EVALUATE}
"""Options by heading, by command."""

_OPENINGS = {
    "fit": (
        "bdpo fit --model.policy MODEL --data.train PAIRS [--option VALUE ...]",
        "Align a model on preference pairs. With no option: the small embedded model on the embedded pairs.",
    ),
    "diagnose": (
        "bdpo diagnose --model.policy MODEL --data.train PAIRS [--option VALUE ...]",
        "Analyse a preference set with a model, before training. It takes all options of fit, too.",
    ),
    "evaluate": (
        "bdpo evaluate [LABEL=]MODEL ... [--option VALUE ...]",
        "Measure the safety of models side by side; the first is the baseline. MODEL: folder, hub name, checkpoint.",
    ),
}


def page(command: str) -> str:
    """Return the help of `fit`, `diagnose` or `evaluate`."""
    usage, what = _OPENINGS[command]
    lines = [f"usage: {usage}", f"       (or python -m bdpo_pl.{command})", "", *textwrap.wrap(what, _WIDTH)]
    for heading, options in SHORT_HELP[command].items():
        lines += ["", f"{heading}:"]
        for option in options:
            lines += entry(option)
    more = (
        "--judge.help NAME the options of a judge"
        if command == "evaluate"
        else "--model.loss.help LOSS the options of a loss"
    )
    lines += ["", f"--help_all lists every option, --print_config their values, and {more}."]
    return "\n".join(lines)


def entry(option: Option) -> list[str]:
    """Return the lines of one option."""
    names = f"  --{option.name}"
    if option.short:
        names += f", --{option.short}"
    text = f"{option.help} (default: {option.default})" if option.default else option.help
    body = textwrap.wrap(text, _WIDTH - _COLUMN)
    first = f"{names:<{_COLUMN}}" if len(names) < _COLUMN else None
    indent = " " * _COLUMN
    if first is None:
        return [names, *(indent + line for line in body)]
    return [first + body[0], *(indent + line for line in body[1:])]
