"""Checks for contradictory options of a training run, made before anything is loaded."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from bdpo_pl.data.held_out import HELD_OUT
from bdpo_pl.embedded import EMBEDDED
from bdpo_pl.errors import InputError
from bdpo_pl.models.precision import most_processes
from bdpo_pl.scoring.reference_sync import SyncOptions
from bdpo_pl.scoring.scoring_pass import ScoringOptions
from bdpo_pl.training.metrics import NAMES
from bdpo_pl.training.module import PreferenceModule
from bdpo_pl.training.safety_probe import SafetyProbe
from bdpo_pl.training.throughput import TIMED


def check_combinations(config: Namespace, defaults: Namespace) -> None:
    """Refuse combinations of options in which one option disables another.

    Args:
        config: All options.
        defaults: Default options.

    Raises:
        InputError: Two options contradict each other.
    """
    if config.data.max_tokens_per_batch is not None:
        for name in ("batch_size", "eval_batch_size"):
            if config.data[name] != defaults.data[name]:
                raise InputError(
                    f"data.{name} and data.max_tokens_per_batch both say how large a batch is: leave out one of them"
                )
    _check_unread(config, defaults)
    _check_places(config.data, defaults.data)
    _check_processes(config.trainer)
    if config.trainer.fast_dev_run and config.export_from == "best":
        raise InputError("export_from is best, but trainer.fast_dev_run keeps no checkpoint: leave out one of them")
    if config.export_from == "best":
        if not (config.export or config.export_adapter):
            raise InputError("export is false, so export_from best has nothing to export: leave out one of them")
        if config.checkpoint.save_top_k == 0:
            raise InputError("export_from is best, but checkpoint.save_top_k 0 keeps no checkpoint; set it to 1")
    if config.push_to_hub is not None and not (config.export or config.export_adapter):
        raise InputError("export is false, so there is nothing to push_to_hub: leave out one of them")
    if config.push_to_hub is None and config.hub_private_repo != defaults.hub_private_repo:
        raise InputError("hub_private_repo is about the repository of push_to_hub, which is not set: leave it out")
    if config.export_adapter and config.model.lora is None:
        raise InputError("export_adapter is true, but there is no adapter: set model.lora, or leave export_adapter out")


def _check_processes(trainer: Namespace) -> None:
    """Refuse more processes than this machine can run: on a CPU each device is a process with a model of its own."""
    on_cpu = trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not torch.cuda.is_available())
    devices = str(trainer.devices)
    if on_cpu and devices.isdecimal() and int(devices) > most_processes():
        raise InputError(
            f"trainer.devices {devices} would start {devices} processes, each with a model of its own, on the "
            f"{os.cpu_count()} cores of this machine; set it to at most {most_processes()}, or leave it out for "
            "one process"
        )


def check_kept(trainer: Namespace) -> None:
    """Refuse options of the Trainer that take away what a run needs, before Lightning does in its own words.

    Raises:
        InputError: the Trainer would keep no checkpoints, or measure nothing.
    """
    if trainer.barebones:
        raise InputError(
            "trainer.barebones would measure and keep nothing, and a run always does: leave it out; for a quick trial "
            "there is trainer.fast_dev_run"
        )
    if trainer.enable_checkpointing is False:
        raise InputError(
            "trainer.enable_checkpointing is false, but a run always writes last.ckpt, from which it is resumed: leave "
            "it out; --checkpoint.save_top_k 0 keeps no other checkpoint"
        )


def never_validates(trainer: Namespace) -> str | None:
    """Return why a run with these options of the Trainer ends without a validation; None if it has one."""
    if trainer.limit_val_batches == 0:
        return "leave out trainer.limit_val_batches 0"
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
    if every is not None and epochs is not None and 0 < epochs < every and not trainer.fast_dev_run:
        return f"lower trainer.check_val_every_n_epoch {every} to at most trainer.max_epochs {epochs}"
    return None


def _check_unread(config: Namespace, defaults: Namespace) -> None:
    """Refuse an option that has no effect because of another one."""
    data, model = config.data, config.model
    asks = any(_of(config, f"safety.{kind}") for kind in ("harmful", "jailbreak", "benign"))
    unread = (
        ("data.held_out_fraction", data.held_out is not None, "data.held_out says which pairs are held out"),
        ("data.held_out_fraction", data.train == EMBEDDED, "the embedded set has held-out pairs of its own"),
        ("data.held_out_split", data.held_out is None, "it is a split of data.held_out, which is not set"),
        ("data.max_prompt_length", data.truncation == "drop", "data.truncation is drop, which cuts nothing"),
        ("model.reference_dtype", model.reference_mode == "none", "model.reference_mode is none"),
        (
            "model.scoring.cache_dir",
            model.reference_mode in ("none", "live"),
            "nothing is cached without a scoring pass",
        ),
        ("model.scoring.chunk_pairs", model.reference_mode in ("none", "live"), "there is no scoring pass"),
        ("model.revision", _is_here(model.policy), "a folder has no revisions, only models of the hub have"),
        ("completions.max_new_tokens", not _of(config, "completions.num_prompts"), "completions.num_prompts is 0"),
        *(
            (f"safety.{name}", not asks, "no prompts are given with safety.harmful, safety.jailbreak or safety.benign")
            for name in ("max_new_tokens", "max_prompts", "batch_size")
        ),
        ("trainer.limit_test_batches", True, "nothing is tested here"),
        ("trainer.limit_predict_batches", True, "nothing is predicted here"),
        ("model.reference_sync.mixup", not _of(model, "reference_sync.every"), "model.reference_sync.every is not set"),
    )
    for name, ignored, why in unread:
        given = _of(config, name)
        if ignored and given and given != _of(defaults, name, _DEFAULTS.get(name)):
            raise InputError(f"{name} is {given}, but it would have no effect: {why}; leave it out")


def _is_here(name: str) -> bool:
    """Return true for a model, or a source of pairs, on this machine."""
    return name == EMBEDDED or Path(name).expanduser().exists()


def _check_places(data: Namespace, defaults: Namespace) -> None:
    """Refuse split, subset and revision where no source of pairs has any."""
    train = _sources(data.train)
    held_out = _sources(list(data.held_out.values()) if isinstance(data.held_out, Mapping) else data.held_out)
    given: list[tuple[str, Any, str, list[tuple[str, Mapping[str, Any]]]]] = [
        (f"{name} of {source}", options.get(name), name, [(source, {})])
        for source, options in (*train, *held_out)
        for name in _PLACES
    ]
    for option, name, of in (
        ("split", "split", train), ("held_out_split", "split", held_out), ("subset", "subset", train + held_out),
        ("revision", "revision", train + held_out),
    ):  # fmt: skip
        if data[option] != defaults[option]:
            given.append((f"data.{option}", data[option], name, of))
    for option, value, name, of in given:
        if value is not None and not any(own.get(name) is None and _has(source, name) for source, own in of):
            raise InputError(f"{option} is {value}, but it would have no effect: {_PLACES[name]}; leave it out")


_PLACES = {
    "split": "a file has no splits, nor has a folder, unless a DatasetDict is saved in it",
    "subset": "files and folders have no subsets, only datasets of the hub have",
    "revision": "files and folders have no revisions, only datasets of the hub have",
}


def _sources(given: object) -> list[tuple[str, Mapping[str, Any]]]:
    """Return each source of pairs with its own options."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for one in one_or_more(given):
        options = {"source": one} if isinstance(one, str) else one if isinstance(one, Mapping) else vars(one)
        found.append((str(options["source"]), options))
    return found


def _has(source: str, name: str) -> bool:
    """Return true if `source` may have what the option `name` chooses."""
    if name == "split" and (Path(source).expanduser() / "dataset_dict.json").is_file():
        return True
    return not _is_here(source)


_DEFAULTS = {"model.scoring.chunk_pairs": ScoringOptions.chunk_pairs, "model.reference_sync.mixup": SyncOptions.mixup}


def _of(options: object, name: str, default: object = None) -> Any:
    """Return the value of the option `name`; `default` if the option or its group is not given."""
    for part in name.split("."):
        options = getattr(options, part, None)
    return default if options is None else options


def one_or_more(value: object) -> list[Any]:
    """Return `value` as a list: callbacks may be given as a list, as one alone, or not at all."""
    return value if isinstance(value, list) else [] if value is None else [value]


def check_monitor(monitor: str | None, module: PreferenceModule, config: Namespace, probe: SafetyProbe) -> None:
    """Refuse a `checkpoint.monitor`, or a monitor of `EarlyStopping`, that will never be logged.

    Args:
        monitor: Name of the monitored metric.
        module: Module whose loss and reference determine the logged metrics.
        config: All options.
        probe: Safety probe, with the metrics that it logs.

    Raises:
        InputError: Nothing logs the metric.
    """
    callbacks = one_or_more(config.trainer.callbacks)
    own = [(str(c.get("class_path") or ""), c.get("init_args") or {}) for c in callbacks if hasattr(c, "get")]
    # The user's own callbacks may log any metric; these log none.
    if any(path and path.rpartition(".")[2] not in _SILENT for path, _ in own):
        return
    monitors = {"checkpoint.monitor": monitor}
    monitors |= {f"the monitor of {path.rpartition('.')[2]}": given.get("monitor") for path, given in own}
    logged = logged_names(module, config, probe)
    for option, name in monitors.items():
        if name is None or name in logged:
            continue
        meant = difflib.get_close_matches(name, logged, n=3, cutoff=0.5)
        raise InputError(
            f"{option} is {name}, which this run never logs; "
            + (f"did you mean {' or '.join(meant)}?" if meant else f"it logs {', '.join(sorted(logged))}")
        )


_SILENT = ("EarlyStopping", "ModelCheckpoint", "Timer", "RichProgressBar", "TQDMProgressBar", "ModelSummary")
"""Names of Lightning's callbacks that log no metric."""


def logged_names(module: PreferenceModule, config: Namespace, probe: SafetyProbe) -> set[str]:
    """Return the name of every metric that a run with these options logs."""
    values = set(NAMES)
    if module.reference_mode == "none":
        values -= {"drift_chosen", "drift_rejected"}
    if module.reference_mode == "none" or not module.scoring.comprehension:
        values -= {"comprehension_chosen", "comprehension_rejected"}
    if module.loss.needs_labels:
        values -= {"logp_accuracy"}
    splits = {"train"}
    if config.data.held_out is not None or config.data.held_out_fraction > 0:
        splits |= {HELD_OUT} | ({"train_probe"} if config.data.train_probe else set())
    if isinstance(config.data.held_out, Mapping):
        splits |= {f"{HELD_OUT}/{name}" for name in config.data.held_out}
    logged = {f"{split}/{value}" for split in splits for value in values}
    logged |= {"train/grad_norm", "train/lr", "train/padding_share", *TIMED, "epoch", "step"} | probe.logged
    if "train_probe" in splits:
        logged |= {"gap/margin", "gap/accuracy"}
    return logged
