"""Sample completions: what the policy answers to some held-out prompts, before, during and after training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from bdpo_pl.data.consistency import first_of_prompt
from bdpo_pl.data.held_out import HELD_OUT
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt
from bdpo_pl.forward.generation import generate
from bdpo_pl.models.loading import num_positions
from bdpo_pl.refusals import is_refusal
from bdpo_pl.training.completions_file import CompletionsFile, Row
from bdpo_pl.training.module import PreferenceModule
from bdpo_pl.training.safety_probe import SafetyProbe
from bdpo_pl.training.schedule_free import at_average
from bdpo_pl.training.tracking import log_completions

_BATCH = 32


class LogCompletions(L.Callback):
    """Logs completions of the policy at each validation: prompt, completion, and the chosen and rejected responses.

    They are generated greedily, before training, at every validation and after training. Where the safety probe
    measures, some of its answers are logged too, with whether they are refusals. The rows go into `completions.jsonl`
    in the run's folder, as tables to W&B, TensorBoard, MLflow and trackio, and as a section into the report.

    Args:
        num_prompts: number of held-out prompts, spread evenly, and at most as many of each suite of the safety probe;
            0: no completions.
        max_new_tokens: maximum number of tokens in a completion.
        show_texts: include the texts in the report of the run, with a warning. They may be harmful or private. By
            default it has lengths and shares, and the texts are in `completions.jsonl` and in the loggers.

    Raises:
        InputError: a number is out of its range, or an option would have no effect.
    """

    def __init__(self, num_prompts: int = 0, max_new_tokens: int = 64, show_texts: bool = False) -> None:
        if num_prompts < 0:
            raise InputError(f"completions.num_prompts must be at least 0, got {num_prompts}")
        if max_new_tokens < 1:
            raise InputError(f"completions.max_new_tokens must be at least 1, got {max_new_tokens}")
        if show_texts and not num_prompts:
            raise InputError(
                "completions.show_texts shows completions, and there are none: set completions.num_prompts"
            )
        self.num_prompts = num_prompts
        self.max_new_tokens = max_new_tokens
        self.show_texts = show_texts
        self.file = CompletionsFile()
        self._chosen: list[int] | None = None
        self._latest_step: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a strategy whose ranks hold parts of a model in a way in which it cannot generate.

        Raises:
            InputError: the strategy is none of one device, DDP and FSDP2.
        """
        if not self.num_prompts:
            return
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)):
            raise InputError(
                f"completions.num_prompts works on one device, with ddp and with fsdp2, but trainer.strategy is "
                f"{type(trainer.strategy).__name__}; choose one of these, or leave completions.num_prompts out"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SafetyProbe):
                callback.on_answers = self._take_answers

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Complete the prompts before training."""
        if self.num_prompts and trainer.global_step == 0:
            self._log_held_out(trainer, pl_module, "before training")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Complete the prompts at a validation, before its checkpoint is written."""
        if self.num_prompts and not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self._log_held_out(trainer, pl_module, f"step {trainer.global_step}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Complete the prompts after training."""
        if self.num_prompts and self._latest_step != trainer.global_step:
            self._log_held_out(trainer, pl_module, "after training")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Complete the prompts of a run with no steps left, for which Lightning calls none of the hooks above."""
        if self.num_prompts and self._latest_step != trainer.global_step:
            pl_module.to(trainer.strategy.root_device)
            self.on_train_end(trainer, pl_module)
        if self.num_prompts:
            self.file.begin(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the number and the digest of the rows on disk, for a resumed run."""
        return {"rows": self.file.num_rows, "digest": self.file.digest, "latest_step": self._latest_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of rows, so that later ones are not doubled."""
        self.file.take_up(state_dict["rows"], state_dict["digest"])
        self._latest_step = state_dict["latest_step"]

    def _log_held_out(self, trainer: L.Trainer, pl_module: L.LightningModule, when: str) -> None:
        """Generate and log; ranks with parts of one model generate together, else the first rank alone."""
        assert isinstance(pl_module, PreferenceModule)
        self._latest_step = trainer.global_step
        splits = pl_module.splits
        tokenizer = splits.tokenizer
        if self._chosen is None:
            if HELD_OUT not in splits.tables:
                raise InputError(
                    "completions.num_prompts needs held-out pairs: set data.held_out, or data.held_out_fraction above 0"
                )
            window = num_positions(pl_module.policy.config)
            most = None if window is None else window - self.max_new_tokens
            self._chosen = choose_prompts(splits.tables[HELD_OUT], self.num_prompts, most)
        table = splits.tables[HELD_OUT]
        # Every rank takes part, because Lightning broadcasts the folder.
        self.file.begin(trainer)
        if not trainer.is_global_zero and not isinstance(trainer.strategy, ModelParallelStrategy):
            return
        rank_zero_info(f"Generating completions of {len(self._chosen)} held-out prompts ({when})")
        prompts = [table[i].prompt_ids for i in self._chosen]
        with trainer.precision_plugin.forward_context(), at_average(trainer.optimizers, pl_module.policy):
            found = generate(
                pl_module.policy, tokenizer, prompts, max_new_tokens=self.max_new_tokens, batch_size=_BATCH
            )
        rows = [
            {**_references(table, i, tokenizer), "completion": r.text, "num_tokens": r.num_tokens,
             "finished": r.finished}
            for i, r in zip(self._chosen, found, strict=True)
        ]  # fmt: skip
        self._write(trainer, HELD_OUT, rows)

    def _take_answers(
        self, trainer: L.Trainer, suite: str, prompts: Sequence[EvaluationPrompt], answers: Sequence[str]
    ) -> None:
        """Log some of the safety probe's answers, those of the first rank's prompts."""
        self.file.begin(trainer)
        rows = [
            {"place": prompt.place, "prompt": prompt.text, "completion": answer, "refused": is_refusal(answer)}
            for prompt, answer in list(zip(prompts, answers, strict=True))[: self.num_prompts]
        ]
        self._write(trainer, suite, rows)

    def _write(self, trainer: L.Trainer, split: str, rows: Sequence[dict[str, Any]]) -> None:
        if not trainer.is_global_zero or not rows:
            return
        whole = [Row(**{"step": trainer.global_step, "set": split, **row}) for row in rows]
        self.file.append(whole)
        log_completions(trainer.loggers, split, [row.fields() for row in whole], trainer.global_step)


def choose_prompts(table: PairTable, number: int, most_tokens: int | None) -> list[int]:
    """Return the indices of pairs with `number` different prompts, spread evenly; fewer if there are fewer.

    Args:
        table: pairs.
        number: number of prompts.
        most_tokens: maximum number of tokens in a prompt; None: any.

    Raises:
        InputError: no prompt is that short.
    """
    first: dict[int, int] = {}
    for i, prompt in enumerate(first_of_prompt(table)):
        if most_tokens is None or table.prompt_lengths[i] <= most_tokens:
            first.setdefault(prompt, i)
    if not first:
        raise InputError(
            "completions.num_prompts: no held-out prompt and completions.max_new_tokens more tokens fit into the "
            "model's positions; lower completions.max_new_tokens"
        )
    fitting = list(first.values())
    places = np.linspace(0, len(fitting) - 1, min(number, len(fitting))).round().astype(int)
    return [fitting[at] for at in places.tolist()]


def _references(table: PairTable, index: int, tokenizer: TokenizerLike) -> dict[str, Any]:
    """Return place, prompt and responses of the data as texts; of a single answer, the answer and its label."""
    pair = table[index]
    found: dict[str, Any] = {"place": table.places[index], "prompt": tokenizer.decode(pair.prompt_ids)}
    chosen = tokenizer.decode(pair.chosen_ids, skip_special_tokens=True).strip()
    if table.desirable is not None:
        return {**found, "answer": chosen, "label": bool(table.desirable[index])}
    return {
        **found,
        "chosen": chosen,
        "rejected": tokenizer.decode(pair.rejected_ids, skip_special_tokens=True).strip(),
    }
