"""The job of `bdpo_pl.fit`: train, export, and report what changed."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import yaml  # type: ignore[import-untyped]
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only

import bdpo_pl.parallel.fsdp2  # noqa: F401 - names the strategy fsdp2
from bdpo_pl.cli.job import FitCLI, parse_options
from bdpo_pl.console import get_console, paths_table
from bdpo_pl.errors import InputError, StoppedError
from bdpo_pl.files import RunFolder
from bdpo_pl.models.checkpoint import read_checkpoint
from bdpo_pl.parallel.state import whole_state
from bdpo_pl.reporting.format import plural, seconds
from bdpo_pl.training.callbacks import LastCheckpoint
from bdpo_pl.training.checkpoints import find_checkpoint, known_folder, what_is_saved
from bdpo_pl.training.completions import LogCompletions
from bdpo_pl.training.completions_file import CompletionsFile, read_rows
from bdpo_pl.training.disk import SaysDisk
from bdpo_pl.training.export import export_adapters, export_model
from bdpo_pl.training.hub import HubUpload
from bdpo_pl.training.memory_report import WarnsOfMemory, dry_run
from bdpo_pl.training.metrics_file import step_first
from bdpo_pl.training.model_card import describe
from bdpo_pl.training.module import PreferenceModule
from bdpo_pl.training.resumable import resumable
from bdpo_pl.training.run_progress import RunProgress
from bdpo_pl.training.run_report import read_curves, run_page
from bdpo_pl.training.safety_probe import SafetyProbe
from bdpo_pl.training.start_warnings import WarnsAtStart
from bdpo_pl.training.summary import (
    measured_pairs,
    no_step_taken,
    none_before,
    not_all_measured,
    not_all_trained,
    not_reported,
    of_another_step,
    remark_line,
    remarks,
    summary_rows,
    summary_table,
)
from bdpo_pl.training.tracking import log_files, log_options


def run(args: list[str], description: str | None) -> None:
    """Run the job that `args` describe; `description` is the first text of the help."""
    start = time.perf_counter()
    cli = parse_options(FitCLI, args, description)
    trainer = cli.trainer
    if cli.config.dry_run:
        dry_run(trainer, cli.model, cli.datamodule, reads_data=cli.gives_data)
        return
    checkpoint = find_checkpoint(cli.config.ckpt_path, Path(trainer.default_root_dir))
    # Only rank 0 knows the folder and writes it; the other ranks wait for it where the strategy sets up.
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    if first and checkpoint is None:
        _refuse_finished(trainer)
    named = cli.config.push_to_hub
    upload = HubUpload(named, cli.config.hub_private_repo) if named is not None and first else None
    if upload is not None:
        upload.make_repository()
    folder = Path(trainer.log_dir or trainer.default_root_dir) if first else None
    with nullcontext() if folder is None else RunFolder(folder):
        try:
            _align(cli, checkpoint, start, upload)
        except StoppedError as stopped:
            # The other processes may go on, so this one must not ask them for anything.
            if stopped.saved or folder is None:
                raise
            saved = what_is_saved(known_folder(trainer) or folder / "checkpoints", checkpoint)
            raise StoppedError(f"{stopped}; {saved}", stopped.signal, saved=True) from None


def _refuse_finished(trainer: L.Trainer) -> None:
    """Refuse to begin a run in the folder of a finished one, whose files would lie beside the new ones or be replaced.

    Raises:
        InputError: the logger names such a folder, or there is no logger, and the Trainer's root is such a folder.
    """
    if trainer.logger is None:
        folder, ckpt_path = Path(trainer.default_root_dir), "--ckpt_path last"
        remedy = (
            "without a logger this run has no other: set trainer.default_root_dir to another folder, or leave "
            "trainer.logger out, which gives each run a folder of its own"
        )
    elif isinstance(trainer.logger, CSVLogger | TensorBoardLogger):
        folder, ckpt_path = Path(trainer.logger.log_dir), "--ckpt_path"
        remedy = (
            "this one starts from the beginning: leave trainer.logger.init_args.version out, which gives it a new "
            "folder, or set it to another name"
        )
    else:  # other loggers give runs no folders of their own
        return
    if found := [name for name in ("model", "adapter", "summary.json") if (folder / name).exists()]:
        raise InputError(
            f"{folder} is the folder of a finished run (it has {', '.join(found)}), and {remedy}; to train that run "
            f"on, give {ckpt_path}"
        )


def _align(cli: FitCLI, checkpoint: str | None, start: float, upload: HubUpload | None) -> None:
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    trainer.callbacks += [WarnsOfMemory(), SaysDisk(cli.config.export)]  # type: ignore[attr-defined]
    if not isinstance(trainer.progress_bar_callback, RunProgress):
        trainer.callbacks.append(WarnsAtStart())  # type: ignore[attr-defined]
    resumable(trainer, checkpoint, cli.config_init.resume.allow)
    if trainer.is_global_zero:
        log_options(trainer.loggers, lambda: yaml.safe_load(cli.parser.dump(cli.config, skip_none=False)))
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    measured = module.evaluations.keys() - module.unlogged
    if module.global_step not in measured and "held_out" in data.tables:
        trainer.validate(module, data, verbose=False)
    # Computed on every rank, because Lightning broadcasts it.
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    # All ranks contribute their parts.
    state = None if _is_plain(module, trainer) else whole_state(module.policy, module.lora is not None)
    if not trainer.is_global_zero:
        return
    probe: SafetyProbe = cli.config_init.safety
    sampled: LogCompletions = cli.config_init.completions
    held_out = module.splits.held_out_pairs
    last = module.global_step
    exported = _choose(cli.config_init.checkpoint, module) if cli.config.export_from == "best" else _Exported(last)
    step, best = exported.step, exported.path
    sets = measured_pairs(module.intervals.get(step, module.intervals.get(last, {})), held_out)
    pairs = next(iter(sets.values()), None)
    results = module.evaluations, step, probe.before, probe.after if step == last else probe.measured.get(step, {})
    counted: Any = {"intervals": module.intervals, "pairs": pairs, "prompts": probe.counts, "sets": sets}
    counted["single"] = single = module.loss.needs_labels
    rows = summary_rows(*results, **counted)
    complete = step == last or (step in module.evaluations and all(row[-1] != "–" for row in rows))
    weights = exported.said if complete else f"{exported.said}; a dash: not measured at that step"
    card = describe(trainer, module, data, rows, pairs, bool(probe.suites), weights)
    paths = {"report of the run": folder / "report.html", "configuration": folder / "config.yaml"}
    paths["metrics"] = folder / "metrics.csv"
    if sampled.num_prompts:
        paths["completions"] = folder / CompletionsFile.NAME
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.best_model_path:
            name = "last checkpoint" if isinstance(callback, LastCheckpoint) else f"best by {callback.monitor}"
            if callback is cli.config_init.checkpoint:
                name = "best checkpoint"
            paths[name] = Path(callback.best_model_path)
    if cli.config.export:
        paths["aligned model"] = export_model(module, data.tokenizer, folder / "model", state, best, card.text())
    if cli.config.export_adapter and module.lora is not None:
        assert state is not None
        paths["adapter"] = export_adapters(module, folder / "adapter", state, best, card.of_adapter().text())
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            logger.save()
    step_first(paths["metrics"])
    said = remarks(module.evaluations, pairs, bool(probe.suites), single)
    if pairs is not None and module.changed_measures and 0 not in module.evaluations:
        said.append(none_before("held-out pairs", module.changed_measures))
    if probe.left_out:
        said.append(none_before(f"{', '.join(probe.left_out)} prompts", dict.fromkeys(probe.left_out.values())))
    if pairs is not None and sets != held_out:
        said.insert(0, not_all_measured(pairs, next(iter(held_out.values())), "answer" if single else "pair"))
    share = data.trained_share(step)
    if 0 < share < 1 and "gap/margin" in module.evaluations.get(step, {}):
        said.insert(0, not_all_trained(share, "The run" if step == last else "What is exported"))
    if step != last:
        said.insert(0, of_another_step(exported.said, complete))
    if last in (module.resumed_at, 0):
        said.insert(0, no_step_taken(last))
    (folder / "summary.json").write_text(json.dumps({"rows": rows, "said": said}, ensure_ascii=False), encoding="utf-8")
    taken = time.perf_counter() - start
    device = str(trainer.strategy.root_device)
    title = f"{card.base}, {card.loss}"
    try:
        curves = read_curves(paths["metrics"])
        completions = read_rows(folder) if sampled.num_prompts else []
        shown = (list(sets), completions, sampled.show_texts, single)
        page = run_page(title, card.facts, rows, said, curves, device, taken, *shown)
        page.write(paths["report of the run"])
    except Exception as error:  # a page that fails must not cost the steps after it
        said.append(not_reported(error))
        del paths["report of the run"]
    console = get_console()
    console.print(summary_table(*results, **counted))
    for level, sentence in said:
        console.print(remark_line(level, sentence))
    console.print(paths_table(paths))
    log_files(trainer.loggers, [paths[name] for name in ("report of the run", "configuration") if name in paths])
    if upload is not None:
        # After all else: whatever happens to it, the run is complete.
        sent = paths.get("aligned model", paths.get("adapter"))
        assert sent is not None
        console.print(f"Uploaded to {upload.send(sent, title)}")
    console.print(f"Done in {seconds(taken)}, {last} {plural(last, 'optimiser step')}")


def _is_plain(module: PreferenceModule, trainer: L.Trainer) -> bool:
    return module.lora is None and not isinstance(trainer.strategy, ModelParallelStrategy)


@dataclass(frozen=True)
class _Exported:
    """The weights that are exported.

    Attributes:
        step: optimiser step that they are of.
        path: checkpoint that holds them; None: they are the last ones.
        said: description of them, if they were chosen.
    """

    step: int
    path: Path | None = None
    said: str = ""


def _choose(chosen: ModelCheckpoint, module: PreferenceModule) -> _Exported:
    """Return the best weights by the options of the command, not by a callback of the user's own.

    Those at the end may be the best ones. They are no candidates of Lightning's if the last validation was before.
    """
    monitor, last = str(chosen.monitor), module.global_step
    at_end = module.evaluations.get(last, {}).get(monitor)
    before = None if chosen.best_model_score is None else float(chosen.best_model_score)
    if at_end is not None and (before is None or (at_end < before if chosen.mode == "min" else at_end > before)):
        return _Exported(last, None, _which(last, last, monitor, at_end))
    if chosen.best_model_path:
        path = Path(chosen.best_model_path)
        step = int(read_checkpoint(path)["global_step"])
        return _Exported(step, path, _which(step, last, monitor, before))
    raise InputError(
        "export_from is best, but no validation chose a checkpoint: lower trainer.val_check_interval, or resume with "
        "--ckpt_path last --export_from last"
    )


def _which(step: int, last: int, monitor: str, score: float | None) -> str:
    by = monitor if score is None else f"{monitor} {score:.4g}"
    return f"those of step {step:,} of {last:,}, the best by {by}"
