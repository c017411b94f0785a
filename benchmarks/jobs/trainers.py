"""One trainer's whole job in its own process: `python -m benchmarks.jobs.trainers CONTENDER FOLDER`, with JSON output.

The job goes from a folder with a model and a file of pairs to trained weights: loading, tokenising, scoring with the
reference and one epoch of training. It excludes imports and the interpreter; peak memory is that of the process.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.jobs.problem import REAL, DPOProblem, read
from benchmarks.machine import process_memory

BETA = 0.1
LORA_RANK = 16


class Curve:
    """Held-out DPO loss as a function of the seconds spent on the job, without validation."""

    def __init__(self, start: float) -> None:
        self.start = start
        self.paused = 0.0
        self.points: list[tuple[float, float]] = []

    def add(self, measure: Callable[[], float]) -> None:
        """Add a point, with the clock stopped while it is measured."""
        seconds = time.perf_counter() - self.start - self.paused
        self.points.append((seconds, self.aside(measure)))

    def aside(self, measure: Callable[[], Any]) -> Any:
        """Measure with the clock stopped."""
        begin = time.perf_counter()
        result = measure()
        self.paused += time.perf_counter() - begin
        return result


def ours(problem: DPOProblem, folder: Path, balance: bool, start: float) -> dict[str, Any]:
    """Run `PreferenceModule` under a Lightning Trainer."""
    import lightning as L

    from bdpo_pl.losses import BalancedDPOLoss, DPOLoss
    from bdpo_pl.scoring.scoring_pass import ScoringOptions
    from bdpo_pl.training.datamodule import PreferenceDataModule
    from bdpo_pl.training.module import PreferenceModule

    losses: list[float] = []
    curve = Curve(start)
    marks: dict[str, float] = {}
    reference: list[torch.Tensor] = []

    class Watch(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            marks["training_starts"] = time.perf_counter()
            if problem.curve:
                # Before the first step the policy is the reference.
                reference.extend(curve.aside(lambda: held_out_margins(trainer, pl_module)))

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(outputs["loss"].item())
            every = max(1, trainer.num_training_batches // max(1, problem.curve))
            if problem.curve and (batch_idx + 1) % every == 0:
                curve.add(lambda: held_out_loss(trainer, module))

    @torch.no_grad()
    def held_out_margins(trainer: Any, module: Any) -> list[torch.Tensor]:
        margins = []
        for batch in trainer.datamodule.val_dataloader()[0]:
            chosen, rejected = module(trainer.strategy.batch_to_device(batch))
            margins.append(chosen - rejected)
        return margins

    def held_out_loss(trainer: Any, module: Any) -> float:
        gained = torch.cat(held_out_margins(trainer, module)) - torch.cat(reference)
        return -F.logsigmoid(BETA * gained).mean().item()

    cache = tempfile.TemporaryDirectory()
    module = PreferenceModule(
        str(folder / "model"),
        loss=BalancedDPOLoss(BETA, tau=0.25) if balance else DPOLoss(BETA),
        scoring=ScoringOptions(cache_dir=cache.name, comprehension=balance),
        optimizer=lambda params: torch.optim.AdamW(params, lr=problem.learning_rate, weight_decay=0.0, fused=True),
        lr_schedule="constant",
        warmup_ratio=0.0,
        **_lora_options(problem),
    )
    data = PreferenceDataModule(
        str(folder / "train.jsonl"),
        str(folder / "held_out.jsonl") if problem.num_held_out else None,
        held_out_fraction=0.0,
        train_probe=False,
        tokenizer=str(folder / "tokenizer"),
        chat_template="auto" if problem.mix == REAL else "none",
        batch_size=problem.batch_size,
        eval_batch_size=8,
        max_length=problem.max_length,
    )
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="gpu" if problem.device == "cuda" else "cpu",
        devices=1,
        precision="32-true" if problem.precision == "float32" else "bf16-true",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0 if not problem.num_held_out else 1.0,
        check_val_every_n_epoch=None,
        val_check_interval=10**9,
        use_distributed_sampler=False,
        callbacks=[Watch()],
    )
    trainer.fit(module, data)
    end = time.perf_counter()
    if len(data.tables["train"]) != problem.num_pairs:
        raise SystemExit(f"{len(data.tables['train'])} of {problem.num_pairs} pairs were trained on")
    return {
        "losses": losses,
        "curve": curve.points,
        "scoring_s": marks["training_starts"] - start,
        "training_s": end - marks["training_starts"] - curve.paused,
        "row_layout": module.row_layout.value,
    }


def trl(problem: DPOProblem, folder: Path, precompute: bool, start: float) -> dict[str, Any]:
    """Run TRL's DPOTrainer with the settings that are fastest here: no checkpointing, fused AdamW, no evaluation."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    losses: list[float] = []
    curve = Curve(start)
    marks: dict[str, float] = {}

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            marks["training_starts"] = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            every = max(1, state.max_steps // max(1, problem.curve))
            if problem.curve and state.global_step % every == 0:
                curve.add(lambda: trainer.evaluate()["eval_loss"])

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    _, train, held_out = read(folder)
    dtype = getattr(torch, problem.precision)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    with tempfile.TemporaryDirectory() as output:
        config = DPOConfig(
            output_dir=output,
            beta=BETA,
            num_train_epochs=1,
            per_device_train_batch_size=problem.batch_size,
            per_device_eval_batch_size=8,
            learning_rate=problem.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_length=problem.max_length,
            # The rows already are in the order of the other trainer's epoch.
            train_sampling_strategy="sequential",
            precompute_ref_log_probs=precompute,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=problem.device == "cpu",
            eval_strategy="no",
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(_in_our_order(train)),
            eval_dataset=Dataset.from_list(held_out) if held_out else None,
            processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
            callbacks=[Watch()],
            peft_config=_peft_config(problem),
        )
        trainer.train()
    end = time.perf_counter()
    return {
        "losses": losses,
        "curve": curve.points,
        "scoring_s": marks["training_starts"] - start,
        "training_s": end - marks["training_starts"] - curve.paused,
    }


CONTENDERS: dict[str, Callable[[DPOProblem, Path, float], dict[str, Any]]] = {
    "ours, B-DPO": lambda problem, folder, start: ours(problem, folder, True, start),
    "ours, DPO": lambda problem, folder, start: ours(problem, folder, False, start),
    "TRL DPO, live reference": lambda problem, folder, start: trl(problem, folder, False, start),
    "TRL DPO, precomputed reference": lambda problem, folder, start: trl(problem, folder, True, start),
}


def _in_our_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from bdpo_pl.data.samplers import PairBatchSampler

    sampler = PairBatchSampler(len(rows), 1, epoch=lambda: 0)
    return [rows[index] for batch in sampler for index, _ in batch]


def _lora_options(problem: DPOProblem) -> dict[str, Any]:
    if not problem.lora:
        return {}
    from bdpo_pl.models.adapters import LoraOptions

    return {"lora": LoraOptions(r=LORA_RANK, alpha=2 * LORA_RANK)}


def _peft_config(problem: DPOProblem) -> Any:
    if not problem.lora:
        return None
    from peft import LoraConfig

    return LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")


def main() -> None:
    """Run the command line."""
    contender, folder = sys.argv[1], Path(sys.argv[2])
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    os.environ.pop("PL_GLOBAL_SEED", None)
    problem, train, _ = read(folder)
    # Imports are no part of a job; `import trl` alone leaves its trainer to be imported where it is first named.
    import datasets  # noqa: F401
    import lightning  # noqa: F401
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if contender.startswith("TRL"):
        from trl import DPOConfig, DPOTrainer  # noqa: F401
    else:
        from bdpo_pl import PreferenceDataModule, PreferenceModule  # noqa: F401
    torch.manual_seed(0)
    start = time.perf_counter()
    result = CONTENDERS[contender](problem, folder, start)
    words = (len(f"{row['prompt']} {row[side]}".split()) + 1 for row in train for side in ("chosen", "rejected"))
    result |= {
        "job_s": result["scoring_s"] + result["training_s"],
        "num_pairs": len(train),
        "num_tokens": problem.num_tokens or sum(words),
        "peak_bytes": torch.cuda.max_memory_allocated() if problem.device == "cuda" else process_memory("VmHWM"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
