"""The job of `bdpo_pl.diagnose`: score the pairs, and report how the model rates them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch.utils.data import DataLoader

from bdpo_pl.cli.diagnosing_single import check_single, report_single
from bdpo_pl.cli.job import FitCLI, parse_options
from bdpo_pl.console import get_console, paths_table
from bdpo_pl.data.splits import PreferenceSplits
from bdpo_pl.data.table import PairTable
from bdpo_pl.diagnosis.estimators import MEANINGS
from bdpo_pl.diagnosis.findings import find
from bdpo_pl.diagnosis.measures import Measured, suggested_tau, temperatures
from bdpo_pl.diagnosis.page import build_page
from bdpo_pl.diagnosis.results import Diagnosis, diagnose_split, find_leaks, pair_lines
from bdpo_pl.diagnosis.terminal import numbers_table, tau_table
from bdpo_pl.errors import InputError
from bdpo_pl.files import writable_folder, write_whole
from bdpo_pl.losses import BalancedDPOLoss, PairScores, PairWeights, PreferenceLoss
from bdpo_pl.reporting.terminal import findings_table
from bdpo_pl.scoring.machine import Machine
from bdpo_pl.scoring.scores import SplitScores, table_scores
from bdpo_pl.training.datamodule import PreferenceDataModule
from bdpo_pl.training.module import PreferenceModule


@dataclass
class DiagnoseOptions:
    """The contents of the report.

    Args:
        folder: folder of the report. Default: `diagnosis` in trainer.default_root_dir. An earlier report there is
            overwritten.
        strong_ratio: minimum ratio of the weights of a pair's two responses for the pair to count as strongly
            re-weighted.
        extremes: number of pairs listed at each end of the imbalance.
        show_texts: include the texts of those pairs, with a warning. They may be harmful or private. By default, pairs
            are identified by place, category and length.

    Raises:
        InputError: a number is out of range.
    """

    folder: str | None = None
    strong_ratio: float = 1.5
    extremes: int = 10
    show_texts: bool = False

    def __post_init__(self) -> None:
        if not self.strong_ratio > 1.0:
            raise InputError(
                f"diagnose.strong_ratio must be above 1, the ratio of equal weights; got {self.strong_ratio}"
            )
        if self.extremes < 0:
            raise InputError(f"diagnose.extremes must be at least 0, got {self.extremes}")


class DiagnoseCLI(FitCLI):
    """The command line of `fit`, with the options of the report."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the report."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(DiagnoseOptions, "diagnose")

    def instantiate_trainer(self, **kwargs: object) -> L.Trainer:
        """Return the Trainer that `fit` would have, of which only device, precision and processes are used."""
        return super().instantiate_trainer(logger=False, enable_progress_bar=False, **kwargs)


def run(args: list[str], description: str | None) -> None:
    """Run the job that `args` describe; `description` is the first text of the help."""
    start = time.perf_counter()
    cli = parse_options(DiagnoseCLI, args, description)
    trainer: L.Trainer = cli.trainer
    options: DiagnoseOptions = cli.config_init.diagnose
    folder = writable_folder(options.folder or Path(trainer.default_root_dir) / "diagnosis", "diagnose.folder")
    if not cli.model.scoring.comprehension:
        raise InputError("diagnose measures comprehension, and model.scoring.comprehension is false; set it to true")
    if cli.model.loss.needs_labels:
        check_single(vars(options), vars(DiagnoseOptions()), cli.model.loss)
    scoring = _Scoring(cli.model, cli.datamodule)
    # Lightning starts the processes and sets up devices and precision, as for `fit`; there is nothing to predict.
    trainer.predict(scoring, DataLoader([0]), return_predictions=False)  # type: ignore[arg-type]
    if not trainer.is_global_zero:
        return
    assert scoring.splits is not None
    console = get_console()
    if cli.model.loss.needs_labels:
        facts, notes = _facts(cli.model, cli.datamodule, str(trainer.precision))
        report_single(scoring.splits, scoring.scores, cli.model.loss, facts, notes, folder, console)
        console.print(f"Done in {time.perf_counter() - start:.0f} s")
        return
    diagnosis, measured = _diagnose(
        cli.model, cli.datamodule, scoring.splits, scoring.scores, str(trainer.precision), options
    )
    paths = write(diagnosis, measured, folder)
    console.print(numbers_table(diagnosis))
    if diagnosis.temperatures:
        console.print(tau_table(diagnosis))
    console.print(findings_table(find(diagnosis)))
    console.print(paths_table(paths))
    console.print(f"Done in {time.perf_counter() - start:.0f} s")


class _Scoring(L.LightningModule):
    """A module whose `setup` reads the pairs and scores them by the reference as `fit` does, on all processes.

    Args:
        module: description of model, loss and reference.
        data: description of the pairs.
    """

    def __init__(self, module: PreferenceModule, data: PreferenceDataModule) -> None:
        super().__init__()
        # Kept in a tuple so that they are not registered as submodules: this module has no weights.
        self._described = (module, data)
        self.splits: PreferenceSplits | None = None
        self.scores: dict[str, SplitScores] = {}

    def setup(self, stage: str) -> None:
        """Read and score the pairs."""
        module, data = self._described
        loss = module.loss
        self.splits = data.read(module.source, order_by_safety=loss.needs_safety, single=loss.needs_labels)
        machine = Machine.of(self.trainer)
        # The same results are needed for a live reference or none.
        reference = module.make_reference("precomputed", machine.precision)
        reference.check_fits(module.loss)
        reference.prepare(machine, self.splits, module.loss)
        for name in self.splits.scored:
            self.scores[name] = reference.scores(name, torch.arange(len(self.splits.tables[name])))

    def configure_model(self) -> None:
        """Build nothing; strategies that split a model require this method."""

    def predict_step(self, *_: object) -> None:
        """Do nothing."""


def _diagnose(
    module: PreferenceModule,
    data: PreferenceDataModule,
    splits: PreferenceSplits,
    scores: Mapping[str, SplitScores],
    precision: str,
    options: DiagnoseOptions,
) -> tuple[Diagnosis, dict[str, Measured]]:
    balance, weights_of = _balance(module.loss, table_scores(splits.tables["train"], scores["train"]))
    measured = {}
    for name, split in scores.items():
        assert split.reference is not None
        assert split.comprehension is not None
        weights = _weights(balance, splits.tables[name], split)
        measured[name] = Measured(
            splits.tables[name],
            split.comprehension.double().numpy(),
            torch.stack([weights.chosen, weights.rejected]).double().numpy(),
            weights.scale.double().numpy(),
            options.strong_ratio,
        )
    shown = splits.tokenizer if options.show_texts else None
    strong = tau = most = None
    if isinstance(balance, BalancedDPOLoss) and balance.weighting == "softmax":
        tau, most = balance.temperature(), balance.max_weight_ratio
        if most is None or most >= options.strong_ratio:
            strong = tau * float(np.log(options.strong_ratio))
    facts, notes = _facts(module, data, precision)
    facts["re-weighted strongly"] = f"one response has at least {options.strong_ratio:g} times the other's weight" + (
        f": an imbalance of {strong:.2f} {MEANINGS[balance.estimator].unit}".rstrip() if strong is not None else ""
    )
    diagnosis = Diagnosis(
        facts=facts,
        unit=MEANINGS[balance.estimator].unit,
        strong_ratio=options.strong_ratio,
        strong_imbalance=strong,
        weights_of=weights_of,
        splits={
            name: diagnose_split(name, m, [r for r in data.reports if r.name == name], options.extremes, shown)
            for name, m in measured.items()
        },
        leaks=find_leaks(splits.tables, splits.tokenizer),
        loading=data.reports,
        notes=notes,
        shows_texts=options.show_texts,
        tau=tau,
        suggested_tau=None if tau is None else suggested_tau(measured["train"]),
        temperatures=[] if tau is None else temperatures(measured["train"], tau, most),
        max_weight_ratio=most,
        estimator=balance.estimator,
    )
    return diagnosis, measured


def _balance(loss: PreferenceLoss, train: PairScores) -> tuple[PreferenceLoss, str | None]:
    """Return the loss whose weights are reported, prepared: `loss` if it has any, else Balanced DPO, with its name."""
    if loss.needs_comprehension:
        loss.prepare(train)
        if loss.weights(train) is not None:
            return loss, None
    balance = BalancedDPOLoss(estimator=loss.estimator)
    balance.prepare(train)
    return balance, f"BalancedDPOLoss(estimator={loss.estimator})"


def _weights(balance: PreferenceLoss, table: PairTable, scores: SplitScores) -> PairWeights:
    weights = balance.weights(table_scores(table, scores))
    assert weights is not None
    return weights


def _facts(module: PreferenceModule, data: PreferenceDataModule, precision: str) -> tuple[dict[str, str], list[str]]:
    """Describe what was measured, and what the reader must know about how the data was read."""
    loss, tokenizer = module.loss, data.tokenizer
    templated = data.reports[0].templated > 0
    facts = {
        "reference model": module.reference_source.name,
        "training pairs": data.train_source,
        "held-out pairs": data.held_out_source
        or (f"{100 * data.held_out_fraction:g}% of the training set, by prompt" if data.held_out_fraction else "none"),
        "comprehension": f"estimator {loss.estimator}"
        + (f", {unit}" if (unit := MEANINGS[loss.estimator].unit) else "")
        + ", against the null prompt "
        + " or ".join(repr(tokenizer.decode(ids)) for ids in data.tables["train"].null_prompts),
        "loss": f"{type(loss).__name__}("
        + ", ".join(f"{k}={v}" for k, v in vars(loss).items() if not k.startswith(("_", "needs_", "initial_")))
        + ")"
        + "".join(f"; {name} found from the training pairs: {value:.4g}" for name, value in loss.state_dict().items()),
        "chat template": data.chat_template
        if data.chat_template != "auto"
        else ("the tokenizer's" if templated else "none"),
        "window": f"{data.truncation.max_length} tokens, longer pairs: {data.truncation.mode}",
        "precision": precision,
    }
    if templated:
        return facts, []
    why = "the tokenizer has none"
    if tokenizer.chat_template:
        why = "it is turned off (data.chat_template, data.dialogues)"
    return facts, [
        f"No chat template: {why}. Prompt and response are read without markup, one after the other, and the null "
        "prompt is the BOS token alone, or the EOS token if the tokenizer has no BOS."
    ]


def write(diagnosis: Diagnosis, measured: Mapping[str, Measured], folder: Path) -> dict[str, Path]:
    """Write the report in its three forms into `folder`; return their paths by kind."""
    page = build_page(diagnosis, measured).write(folder / "report.html")
    numbers, pairs = folder / "diagnosis.json", folder / "pairs.jsonl"
    write_whole(numbers, json.dumps(diagnosis.to_json(), indent=2, ensure_ascii=False) + "\n")
    with pairs.open("w", encoding="utf-8") as lines:
        for name, m in measured.items():
            for line in pair_lines(m, np.arange(len(m.table))):
                fields = {"split": name, **asdict(line)}
                del fields["texts"]
                lines.write(json.dumps(fields, ensure_ascii=False) + "\n")
    return {"report": page, "numbers": numbers, "each pair": pairs}
