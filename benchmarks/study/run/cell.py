"""One cell of the study: draw the pairs, align the reference on them with bdpo_pl itself, and evaluate."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
import warnings
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch

from bdpo_pl.errors import NonFiniteError
from bdpo_pl.models.loading import ModelSource, load_model, load_tokenizer, model_fingerprint
from bdpo_pl.scoring.scoring_pass import ScoringOptions
from bdpo_pl.training.datamodule import PreferenceDataModule
from bdpo_pl.training.module import PreferenceModule
from benchmarks.study.run.evaluate import evaluate, evaluation
from benchmarks.study.run.imbalance import choose, describe, imbalances
from benchmarks.study.run.measures import pair_measures
from benchmarks.study.run.reference import reference_folder
from benchmarks.study.run.settings import Setting
from benchmarks.study.world.texts import preference_pairs

HELD_OUT_PAIRS = 162
# Not the training pairs' seed: the held-out pairs are the same in every cell.
_HELD_OUT_SEED = 0
_NEVER = 10**9


def run_cell(setting: Setting, folder: Path) -> dict[str, Any]:
    """Run one cell and return its metrics, which are the same in every run on one machine, except the seconds.

    Args:
        setting: setting of the cell.
        folder: folder of references and cached scores.

    Returns:
        `key`; `setting`; `texts` and `reference`, digests; `metrics` of `evaluate`, with `pairs` (held-out and training
        pairs: margins and drifts in nats, accuracy, and the gaps between the two); `curve`, the same at optimiser steps
        on the way; `imbalance`, of the pairs trained on; `steps`; `seconds`, wall clock, and `cpu_seconds`. A run whose
        loss or gradient is not finite has `failed` in place of metrics.
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    torch.set_num_threads(1)
    _quieten()
    source = reference_folder(folder, setting.world, setting.reference_steps)
    record: dict[str, Any] = {"key": setting.key, "setting": asdict(setting)}
    record |= {"texts": texts_digest(), "reference": model_fingerprint(ModelSource(str(source)))}
    if not setting.loss:
        policy = load_model(ModelSource(str(source)), torch.float32)
        record["metrics"] = evaluate(policy, load_tokenizer(ModelSource(str(source))), setting.evaluate)
        return record | _times(start, cpu_start)
    L.seed_everything(setting.seed, verbose=False)
    with tempfile.TemporaryDirectory() as scratch:
        train, held_out = Path(scratch) / "train.jsonl", Path(scratch) / "held_out.jsonl"
        rows = preference_pairs("train", setting.num_pairs, setting.seed)
        write_rows(rows, train)
        if setting.pairs != "all":
            rows = choose(rows, imbalances(train, source), setting.pairs, setting.seed)
            write_rows(rows, train)
        write_rows(preference_pairs("test", HELD_OUT_PAIRS, _HELD_OUT_SEED), held_out)
        try:
            record |= _align(setting, source, folder, train, held_out, len(rows))
        except NonFiniteError as error:
            record["failed"] = str(error).split(" Its pairs")[0]
    return record | _times(start, cpu_start)


@cache
def texts_digest() -> str:
    """Return a digest of the content from which pairs and evaluations are made. Another digest means another world."""
    texts = [asdict(evaluation("validation")), asdict(evaluation("test"))]
    pairs = [preference_pairs("train", 100, 0), preference_pairs("test", HELD_OUT_PAIRS, _HELD_OUT_SEED)]
    return hashlib.sha256(json.dumps([texts, pairs]).encode()).hexdigest()[:16]


def _times(start: float, cpu_start: float) -> dict[str, float]:
    """Return wall-clock and processor time since the start; wall-clock time includes the machine's other work."""
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write preference pairs with the labels that SafeDPO needs: only a harmful prompt has an unsafe response."""
    labelled = [row | {"chosen_safe": True, "rejected_safe": row["kind"] != "harmful"} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled), encoding="utf-8")


def _align(setting: Setting, source: Path, folder: Path, train: Path, held_out: Path, num_pairs: int) -> dict[str, Any]:
    module = PreferenceModule(
        str(source),
        loss=setting.build_loss(),
        # Needed for the measures of drift, also of losses that read no reference.
        reference_mode="precomputed",
        reestimate_every=setting.reestimate_every,
        scoring=ScoringOptions(cache_dir=str(folder)),
        optimizer=lambda params: torch.optim.AdamW(params, lr=setting.learning_rate, weight_decay=0.0, fused=True),
    )
    data = PreferenceDataModule(
        str(train),
        str(held_out),
        null_prompt=setting.null_prompt,
        batch_size=setting.batch_size,
        eval_batch_size=HELD_OUT_PAIRS // 2,
    )
    curve = Curve(setting)
    steps = setting.epochs * -(-num_pairs // setting.batch_size)
    trainer = L.Trainer(
        max_epochs=setting.epochs,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=max(1, steps // setting.curve_points) if setting.curve_points else _NEVER,
        use_distributed_sampler=False,
        callbacks=[curve],
    )
    begin = time.perf_counter()
    trainer.fit(module, data)
    trained = time.perf_counter()
    trainer.validate(module, data, verbose=False)
    metrics = evaluate(module.policy, data.tokenizer, setting.evaluate)
    metrics["pairs"] = pair_measures(module.evaluations[module.global_step], "accuracy")
    assert module.reference is not None
    known = module.reference.scores("train", torch.arange(num_pairs)).comprehension
    assert known is not None
    return {
        "metrics": metrics,
        "curve": curve.points,
        "imbalance": describe(known),
        "steps": module.global_step,
        "seconds_training": trained - begin,
    }


class Curve(L.Callback):
    """A callback that evaluates by generation after each validation of the Trainer.

    Args:
        setting: setting that determines the prompts.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.points: list[dict[str, Any]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add a point."""
        module: Any = pl_module
        step = trainer.global_step
        if trainer.state.fn != "fit" or not module.evaluations[step]:
            return
        metrics = evaluate(module.policy, trainer.datamodule.tokenizer, self.setting.evaluate)  # type: ignore[attr-defined]
        self.points.append({"step": step, **metrics, "pairs": pair_measures(module.evaluations[step], "accuracy")})


def _quieten() -> None:
    """Silence Lightning's notes on devices and loaders."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
