"""The LightningDataModule: preference pairs for training, held-out pairs, and a probe of the training pairs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from bdpo_pl import embedded
from bdpo_pl.console import get_console
from bdpo_pl.data.batches import PairDataset
from bdpo_pl.data.boundary import Thoughts
from bdpo_pl.data.consistency import count_shared_prompts
from bdpo_pl.data.example import example_table
from bdpo_pl.data.held_out import HELD_OUT, HeldOut, held_out_sources, split_names
from bdpo_pl.data.loading import LoadOptions, check_used, load_pairs
from bdpo_pl.data.mixture import DataSource, join, limited, occurrences, repeat
from bdpo_pl.data.packing import RowLayout
from bdpo_pl.data.report import DataReport, report_table
from bdpo_pl.data.samplers import PairBatchSampler, StepSampler, TokenBatchSampler, check_budget
from bdpo_pl.data.splits import PreferenceSplits, split_by_prompt
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PairTokenizer, SpelledControlTokens
from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.data.truncation import Truncation, TruncationMode
from bdpo_pl.embedded import EMBEDDED
from bdpo_pl.errors import InputError
from bdpo_pl.models.loading import ModelSource, load_config, load_tokenizer, num_positions
from bdpo_pl.parallel.ranks import data_ranks

_DEFAULT_WINDOW = 1024


class PreferenceDataModule(L.LightningDataModule):
    """Preference pairs, read, checked, tokenised and batched.

    The module, which has the model and the loss, calls `read` before anything else.

    Args:
        train: a file (JSON Lines, JSON, CSV or Parquet, gzipped or not), a folder of them, a hub dataset, or `embedded`
            for the set shipped with bdpo_pl; or several: `[{source: a.jsonl, weight: 2}, {source: b.jsonl}]`.
        held_out: one source of held-out pairs: `a.jsonl`, or `{source: a.jsonl, limit: 500}`; or several by name:
            `{hh: a.jsonl, pku: {source: b.jsonl, limit: 500}}`, each with its own metrics (`held_out/pku/loss`). The
            first is the monitored one, `held_out/loss`. Default: a part of `train` (see `held_out_fraction`).
        held_out_fraction: share of `train` that is held out if `held_out` is not given, split by prompt; 0: none.
        split: split of a hub dataset that is trained on.
        held_out_split: split of a hub dataset that is held out; requires `held_out`.
        revision: git revision of a hub dataset.
        subset: configuration of a hub dataset that has several.
        load: options of reading: schema, column names, bad rows, duplicates and the draw from PKU-SafeRLHF.
        max_length: maximum number of tokens of prompt + response. Default: 1,024, or the model's positions if fewer.
        truncation: treatment of longer pairs: `drop` them, or keep the start (`keep_start`) or the end (`keep_end`) of
            the prompt.
        max_prompt_length: number of tokens that a truncated prompt may always keep. Default: half of `max_length`.
        tokenizer: folder or hub name of the tokenizer. Default: the policy's.
        chat_template: chat template: `auto` (the tokenizer's, if it has one), `none`, or a Jinja file.
        chat_template_kwargs: variables of the chat template (`enable_thinking`, `date_string`, …), for generation too.
        thoughts: treatment of thoughts in responses: trained on (`train`), read but not trained on (`mask`), or removed
            (`strip`).
        dialogues: treatment of HH-RLHF's dialogues: chat messages if there is a chat template (`turns`), or `text`.
        control_tokens: treatment of control tokens that are spelled in a text: `text`, or control tokens (`parse`, for
            texts that are rendered already); `auto`: text with a chat template; without one, the row is refused.
        show_example: print one training pair with the boundary between prompt and response, and the trained tokens. Its
            texts may be harmful or private.
        null_prompt: the user's words in the null prompt against which comprehension is measured.
        batch_size: number of pairs in a micro-batch on each device.
        eval_batch_size: number of pairs in a validation batch on each device. Default: `batch_size`.
        max_tokens_per_batch: number of tokens in a micro-batch on each device, for training and validation, instead of
            the two options above: a batch has as many pairs of similar length as fit. A shared prompt counts once.
        train_probe: validate on a sample of the training pairs too, as many as are held out, each once. The gap between
            the two measures overfitting.
        num_workers: number of processes that build batches.
        seed: seed of the held-out split, the probe and the draw; `seed_everything` seeds the order of training.
    """

    def __init__(
        self,
        train: str | list[DataSource] = EMBEDDED,
        held_out: HeldOut = None,
        held_out_fraction: float = 0.05,
        split: str = "train",
        held_out_split: str = "test",
        revision: str | None = None,
        subset: str | None = None,
        load: LoadOptions | None = None,
        max_length: int | None = None,
        truncation: TruncationMode = "drop",
        max_prompt_length: int | None = None,
        tokenizer: str | None = None,
        chat_template: str = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
        thoughts: Thoughts = "train",
        dialogues: Literal["turns", "text"] = "turns",
        control_tokens: SpelledControlTokens = "auto",
        show_example: bool = False,
        null_prompt: str = "",
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
        train_probe: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("max_tokens_per_batch", max_tokens_per_batch),
        ):
            if value is not None and value < 1:
                raise InputError(f"data.{name} must be at least 1, got {value}")
        if not 0.0 <= held_out_fraction < 1.0:
            raise InputError(f"data.held_out_fraction must be in [0, 1), got {held_out_fraction}")
        if train == EMBEDDED:
            train = str(embedded.TRAIN_FILE)
            if held_out_fraction > 0:
                held_out = held_out or str(embedded.HELD_OUT_FILE)
        self.train_sources = [DataSource(train)] if isinstance(train, str) else train
        if not self.train_sources:
            raise InputError("data.train: the list of sources is empty")
        self.train_source = ", ".join(map(str, self.train_sources))
        self.held_out_sources = held_out_sources(held_out)
        self.held_out_fraction = held_out_fraction
        self.split = split
        self.held_out_split = held_out_split
        self.revision = revision
        self.subset = subset
        self.show_example = show_example
        self.load_options = load or LoadOptions()
        self.max_length = max_length
        self.truncation = Truncation(max_length or _DEFAULT_WINDOW, truncation, max_prompt_length)
        self.tokenizer_name = tokenizer
        self.chat_template = chat_template
        self.chat_template_kwargs = chat_template_kwargs
        self.thoughts = thoughts
        self.dialogues = dialogues
        self.control_tokens = control_tokens
        self.null_prompt = null_prompt
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.max_tokens_per_batch = max_tokens_per_batch
        self.train_probe = train_probe
        self.num_workers = num_workers
        self.seed = seed
        self.splits: PreferenceSplits | None = None
        self.reports: list[DataReport] = []
        self._row_layout: Callable[[], RowLayout] | None = None
        self._resume_batches = 0
        self._train_sampler: StepSampler | None = None

    @property
    def held_out_source(self) -> str | None:
        """Sources of the held-out pairs, with the names of several sets; None if there are none."""
        return ", ".join(f"{n}: {s}" if n else str(s) for n, s in self.held_out_sources.items()) or None

    @property
    def tables(self) -> dict[str, PairTable]:
        """Pairs, by the name of their split."""
        return self._read_splits().tables

    @property
    def tokenizer(self) -> TokenizerLike:
        """Tokenizer that read the pairs."""
        return self._read_splits().tokenizer

    @property
    def pad_id(self) -> int:
        """Token id that fills padding."""
        return self._read_splits().pad_id

    def read(
        self,
        policy: ModelSource,
        *,
        order_by_safety: bool = False,
        single: bool = False,
        row_layout: Callable[[], RowLayout] | None = None,
    ) -> PreferenceSplits:
        """Read every split, once, and print what was kept and dropped.

        Args:
            policy: model whose tokenizer reads the pairs, and whose positions limit the window.
            order_by_safety: put the safe response of a pair first, and drop pairs of two unsafe ones.
            single: read single answers with a label, and no pairs.
            row_layout: function that returns the layout of rows, called for the first batches. Default: a row for each
                response.

        Raises:
            InputError: the pairs cannot be read, or none are left.
        """
        if self.splits is not None:
            return self.splits
        self._row_layout = row_layout
        tokenizer = load_tokenizer(
            policy
            if self.tokenizer_name is None
            else ModelSource(self.tokenizer_name, trust_remote_code=policy.trust_remote_code)
        )
        if self.max_length is None:
            window = min(_DEFAULT_WINDOW, num_positions(load_config(policy)) or _DEFAULT_WINDOW)
            self.truncation = Truncation(window, self.truncation.mode, self.truncation.max_prompt_length)
        pairs = PairTokenizer(
            tokenizer,
            self.chat_template,
            self.null_prompt,
            self.chat_template_kwargs,
            self.thoughts,
            self.dialogues,
            self.control_tokens,
        )

        def load(name: str, given: DataSource, split: str) -> tuple[PairTable, DataReport]:
            table, report = load_pairs(
                name,
                given.source,
                pairs,
                self.truncation,
                self.load_options,
                given.split or split,
                given.revision or self.revision,
                self.seed,
                order_by_safety,
                given.subset or self.subset,
                single,
                alone=False,
            )
            return limited(table, given.limit, self.seed, report), report

        train, weights = self._join([load("train", given, self.split) for given in self.train_sources])
        report = self.reports[-1]
        held_out: dict[str, PairTable] = {}
        for split, (label, given) in zip(
            split_names(self.held_out_sources), self.held_out_sources.items(), strict=True
        ):
            all_held, report_held = load(split, given, self.held_out_split)
            pairs_held = repeat(all_held, np.full(len(all_held), given.weight), self.seed, of=label or split)
            report_held.label = label
            if given.weight != 1.0:
                report_held.note("left out by the weight of the source", len(all_held) - len(pairs_held))
                report_held.describe(pairs_held)
            report_held.note("prompts that are also in train (a leak)", count_shared_prompts(train, pairs_held))
            self.reports.append(report_held)
            held_out[split] = pairs_held
        check_used(self.load_options, self.reports)
        of_all = " (of all sources)" if len(self.train_sources) > 1 else ""
        if not held_out and self.held_out_fraction > 0:
            rest, held = split_by_prompt(train, self.held_out_fraction, self.seed)
            train, weights, held_out[HELD_OUT] = train.select(rest), weights[rest], train.select(held)
            report.note(f"held out for validation, by prompt{of_all}", len(held_out[HELD_OUT]))
        taken = occurrences(train, weights, self.seed)
        train = train if np.all(weights == 1.0) else train.select(taken)
        if any(given.weight != 1.0 for given in self.train_sources):
            report.note(f"pairs in an epoch, by weight{of_all}", len(train))
        tables, probe = {"train": train, **held_out}, None
        if held_out and self.train_probe:
            # Each pair once: repeated ones would make intervals look narrower.
            _, first = np.unique(taken, return_index=True)
            size = min(len(first), len(held_out[HELD_OUT]))
            probe = np.sort(np.random.default_rng(self.seed).choice(first, size, replace=False))
            tables["train_probe"] = train.select(probe)
        monitored = next(iter(self.held_out_sources), "")
        self.splits = PreferenceSplits(tables, tokenizer, self.truncation, self.chat_template, probe, monitored)
        if self.trainer is None or self.trainer.is_global_zero:
            get_console().print(report_table(self.reports))
            if self.show_example:
                get_console().print(example_table(train, tokenizer))
        return self.splits

    def _join(self, loaded: list[tuple[PairTable, DataReport]]) -> tuple[PairTable, np.ndarray]:
        """Return the training pairs of all sources, and the weight of each pair."""
        self.reports = [report for _, report in loaded]
        (train, _), *others = loaded
        weights = [given.weight for given in self.train_sources]
        if not others:
            return train, np.full(len(train), weights[0])
        return join([table for table, _ in loaded], weights, self.reports, self.load_options.duplicates)

    def _read_splits(self) -> PreferenceSplits:
        if self.splits is None:
            raise RuntimeError("the pairs are not read yet: PreferenceModule.setup does, or read(policy)")
        return self.splits

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training pairs, in a different order in every epoch; of `overfit_batches`, the same in all."""
        trainer = self._trainer()
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise InputError(
                "trainer.use_distributed_sampler must be false: this data module splits the batches between ranks "
                "itself, which keeps the mean over pairs exact"
            )
        sampler = self._sampler(
            "train",
            self.batch_size,
            # A function, because Lightning passes the epoch to plain samplers only.
            epoch=lambda: 0 if trainer.overfit_batches else trainer.current_epoch,  # type: ignore[attr-defined]
            seed=int(os.environ.get("PL_GLOBAL_SEED", self.seed)),
            accumulate=trainer.accumulate_grad_batches,
        )
        self._check_interval(sampler.stop_after(trainer.limit_train_batches))
        if self._train_sampler is not None and trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            # A resumed run makes its loader again when it knows its epoch; after an epoch nothing is left of it.
            self._resume_batches = self._resume_batches or self.state_dict()["batches_done"]
        sampler.skip_batches(self._resume_batches)
        self._train_sampler = sampler
        self._resume_batches = 0
        return self._loader("train", sampler)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return each held-out set, then the probe of training pairs, if they exist."""
        samplers = {name: self._sampler(name, self.eval_batch_size) for name in self._read_splits().validation}
        for sampler in samplers.values():
            sampler.stop_after(self._trainer().limit_val_batches)
        return [self._loader(name, sampler) for name, sampler in samplers.items()]

    def trained_share(self, steps: int) -> float:
        """Return the share of an epoch's batches that a run of `steps` optimiser steps has trained on, at most 1."""
        trainer, sampler = self._trainer(), self._train_sampler
        if not sampler:
            return 0.0
        batches = steps * trainer.accumulate_grad_batches
        if trainer.overfit_batches:  # type: ignore[attr-defined]
            batches = min(batches, int(trainer.num_training_batches))
        return min(1.0, batches / len(sampler))

    def state_dict(self) -> dict[str, Any]:
        """Return the number of finished batches of the epoch, from which a resumed run continues."""
        trainer = self._trainer()
        # `processed`, not `ready`, because a batch whose step failed must be repeated.
        processed = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        return {"batches_done": processed % max(1, int(trainer.num_training_batches))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Skip the finished batches of the resumed epoch."""
        self._resume_batches = int(state_dict["batches_done"])
        if self._train_sampler is not None:
            # Split models are restored after the optimiser is set up, and that has already created the loader.
            self._train_sampler.skip_batches(self._resume_batches)
        if self._resume_batches:
            rank_zero_info(f"Resuming after batch {self._resume_batches} of the epoch")

    def _check_interval(self, batches: int) -> None:
        """Raise `InputError` if a validation would come after more batches than the `batches` of an epoch."""
        trainer = self._trainer()
        every, validates = trainer.val_check_interval, trainer.limit_val_batches != 0
        if isinstance(every, int) and every > batches > 0 and trainer.check_val_every_n_epoch is not None and validates:
            raise InputError(
                f"trainer.val_check_interval is {every} batches, but an epoch has {batches}: lower it, or set "
                "trainer.check_val_every_n_epoch to null, by which batches are counted over epochs"
            )

    def _sampler(self, name: str, batch_size: int, **kwargs: Any) -> StepSampler:
        trainer, table = self._trainer(), self.tables[name]
        rank, world_size = data_ranks(trainer)
        kwargs |= {"rank": rank, "world_size": world_size}
        if self.max_tokens_per_batch is None:
            return PairBatchSampler(len(table), batch_size, **kwargs)
        sizes = table.num_tokens(shared=self._layout() is not RowLayout.SPLIT)
        check_budget(sizes, self.max_tokens_per_batch, table.places, "data.max_tokens_per_batch")
        return TokenBatchSampler(sizes, self.max_tokens_per_batch, **kwargs)

    def _layout(self) -> RowLayout:
        """Return the layout in which the policy reads pairs."""
        return RowLayout.SPLIT if self._row_layout is None else self._row_layout()

    def _loader(self, name: str, sampler: StepSampler) -> DataLoader[Any]:
        dataset = PairDataset(self.tables[name], self.pad_id, self._layout())
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=dataset.collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=_on_gpu(self._trainer()),
            # A pass begins with a draw, which would come from the process's own generator: in a run that is resumed
            # within an epoch after its state is restored, so that dropout would differ.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError("PreferenceDataModule works under a Trainer: call trainer.fit(module, datamodule)")
        return self.trainer


def _on_gpu(trainer: L.Trainer) -> bool:
    return trainer.strategy.root_device.type == "cuda"
