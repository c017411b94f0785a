"""What each option of TRL's `trl dpo` is here: TRL's own name, another name, not needed, or not there.

`answer` is printed where someone gives one that has another name or none; `table` is in docs/coming_from_trl.md, where
a test compares it, and `python -m bdpo_pl.cli.from_trl` writes it again. Names that mean the same here are accepted
(`aliases`), and have a row all the same.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

from bdpo_pl.cli import aliases

PAGE = Path(__file__).parents[2] / "docs" / "coming_from_trl.md"
_BEGIN, _END = "<!-- options: written by python -m bdpo_pl.cli.from_trl -->\n", "<!-- end of options -->\n"


class Row(NamedTuple):
    """What one option of TRL is here.

    Attributes:
        kind: `same` (accepted by TRL's name), `other` (another name), `unneeded`, or `refused` (not there).
        here: our options for it, as on the command line; empty for `unneeded` and `refused`, and for `same` filled in
            from the short spellings.
        remark: difference from TRL, or the reason why there is no such option.
    """

    kind: Literal["same", "other", "unneeded", "refused"]
    here: str
    remark: str


def _same(remark: str = "") -> Row:
    return Row("same", "", remark)


def _other(here: str, remark: str = "") -> Row:
    return Row("other", here, remark)


def _unneeded(why: str) -> Row:
    return Row("unneeded", "", why)


def _refused(why: str) -> Row:
    return Row("refused", "", why)


_PARTS = "the loss is summed a micro-batch at a time already, and no logits of a validation are kept"
_LOG = "the bar, the log line and metrics.csv say what there is to say"
_TRACKIO = "--trainer.logger=bdpo_pl.training.trackio_logger.TrackioLogger"
_EVERY = "--checkpoint.every_n_train_steps=500 --checkpoint.monitor=null --checkpoint.save_top_k=-1"
_SHARDED = "--trainer.strategy=bdpo_pl.parallel.fsdp2.ShardedStrategy"
_DDP = "--trainer.strategy=lightning.pytorch.strategies.DDPStrategy --trainer.strategy."
_ANY_LOADER = "batches of token ids are built from arrays in memory, which takes no time worth hiding"

GROUPS: dict[str, dict[str, Row]] = {
    "Model": {
        "model_name_or_path": _same(),
        "model_revision": _same(),
        "dtype": _same("default `auto`: float32 weights, as with TRL, unless the precision ends in -true; TRL's "
                       "`auto`, the checkpoint's own dtype, has its name here: `--dtype bfloat16`"),
        "attn_implementation": _same(),
        "trust_remote_code": _same(),
        "model_init_kwargs": _other("--model.dtype=bfloat16 --model.attn_implementation=sdpa", "each has an option"),
        "router_aux_loss_coef": _same("default 0, also for mixtures; TRL takes the value in the model's configuration"),
        "disable_dropout": _unneeded("dropout and every other noise is off, in the policy and in the reference"),
        "use_cache": _unneeded("training keeps no cache of keys and values"),
        "neftune_noise_alpha": _refused("noise in the policy and none in its reference distorts the loss's comparison"),
        "pad_token": _unneeded("what fills a batch is masked, so any token serves"),
    },
    "Adapters": {
        "use_peft": _same("with `--lora_r` or another option of the adapters, which say the same; default rank 16"),
        "lora_r": _same(),
        "lora_alpha": _same("default twice the rank"),
        "lora_dropout": _same("default 0, with TRL 0.05: noise that the reference does not have"),
        "lora_target_modules": _same("default `all-linear`; TRL takes those that peft has for the model: "
                                     "`[q_proj,v_proj]` for Llama, Mistral and Qwen2, `[c_attn]` for GPT-2"),
        "lora_target_parameters": _same(),
        "lora_modules_to_save": _same(),
        "lora_task_type": _unneeded("every model here is a causal language model"),
        "use_rslora": _same(),
        "use_dora": _same(),
        "load_in_4bit": _same(),
        "load_in_8bit": _refused("QLoRA is 4 bits here: --load_in_4bit"),
        "bnb_4bit_quant_type": _refused("nf4 is the only type: leave it out"),
        "use_bnb_nested_quant": _unneeded("the scales of nf4 are always quantised, too"),
        "bnb_4bit_quant_storage": _refused("weights are stored as bytes; FSDP2 does not run with them"),
    },
    "Data": {
        "dataset_name": _same("also a file or a folder; TRL trains on files by way of `datasets`"),
        "dataset_config": _same(),
        "dataset_train_split": _same(),
        "dataset_test_split": _same("with `--data.held_out`, which names the dataset; without, a part of the training "
                                    "split is held out"),
        "dataset_streaming": _refused("all pairs are read before training, so that every row is checked and counted"),
        "ignore_bias_buffers": _unneeded("no such buffer is handed to DDP"),
        "dataset_num_proc": _unneeded("large sets are tokenised on all cores"),
        "max_length": _same("longer pairs are dropped and counted; TRL cuts them, as a rule the end of the answer"),
        "truncation_mode": _other("--data.truncation=keep_start", "what is cut is the prompt, never first the answer"),
        "padding_free": _unneeded("`--data.max_tokens_per_batch` fills batches with pairs of like length, and the LM "
                                  "head reads no padding"),
        "pad_to_multiple_of": _unneeded("kernels take any length"),
        "remove_unused_columns": _unneeded("columns that are not read are left out, and one that a model should read "
                                           "ends the run by name"),
        "no_remove_unused_columns": _unneeded("columns that are not read are left out"),
        "label_names": _unneeded("there is one layout of batches"),
        "train_sampling_strategy": _other("--data.max_tokens_per_batch=16384", "batches of like length, in a new order "
                                          "each epoch; otherwise the order is random"),
        "length_column_name": _unneeded("lengths are counted in tokens, for every pair"),
    },
    "Batches and steps": {
        "per_device_train_batch_size": _same(),
        "per_device_eval_batch_size": _same("default as for training, with TRL 8; what is measured is the same"),
        "auto_find_batch_size": _other("--dry_run=true", "says the largest batch that fits before anything runs"),
        "gradient_accumulation_steps": _same(),
        "num_train_epochs": _same("whole epochs (`--max_steps` for parts of one); default 1, with TRL 3"),
        "max_steps": _same("without `--num_train_epochs`, in as many epochs as it takes; with it, training ends at "
                           "whichever comes first, and with TRL at the steps"),
        "average_tokens_across_devices": _unneeded("a step's mean over its pairs is exact on any number of devices"),
        "dataloader_drop_last": _unneeded("a last batch that is not full has its exact share of the mean"),
        "dataloader_num_workers": _same(),
        "dataloader_pin_memory": _unneeded(_ANY_LOADER),
        "dataloader_persistent_workers": _unneeded(_ANY_LOADER),
        "dataloader_prefetch_factor": _unneeded(_ANY_LOADER),
        "dataloader_multiprocessing_context": _unneeded(_ANY_LOADER),
        "dataloader_in_order": _unneeded("the order of batches is part of an exact resume"),
        "accelerator_config": _unneeded("Lightning needs no Accelerate: options that begin with `--trainer.` do it"),
    },
    "Loss": {
        "beta": _same(),
        "loss_type": _same("default Balanced DPO, `bdpo`; several: `--model.loss WeightedSum`. exo_pair, nca_pair, "
                           "bco_pair, sppo_hard, aot, aot_unpaired and discopop are not here"),
        "loss_weights": _other("--model.loss=WeightedSum --model.loss.losses='[{class_path: DPOLoss}, {class_path: "
                               "SFTLoss}]' --model.loss.weights=[0.8,1.0]"),
        "label_smoothing": _same("of `dpo`, which is conservative DPO then (TRL's sigmoid ignores it); `robust` has "
                                 "--model.loss.epsilon"),
        "label_smoothing_factor": _other("--model.loss.label_smoothing=0.1", "of a loss that has it"),
        "ld_alpha": _other("--model.loss=LDLoss --model.loss.loss='{class_path: DPOLoss}' --model.loss.alpha=0.5"),
        "use_weighting": _other("--model.loss=WPOLoss --model.loss.loss='{class_path: DPOLoss}'"),
        "f_divergence_type": _refused("reverse KL is the only divergence; a loss of your own is ten lines "
                                      "(docs/training.md)"),
        "f_alpha_divergence_coef": _refused("reverse KL is the only divergence"),
        "discopop_tau": _refused("DiscoPOP is not here"),
        "precompute_ref_log_probs": _same("default true here, and cached between runs"),
        "precompute_ref_batch_size": _other("--model.scoring.batch_tokens=16384", "in tokens; default 16,384 on a GPU, "
                                            "2,048 on a CPU"),
        "sync_ref_model": _other("--model.reference_sync.every=512"),
        "ref_model_sync_steps": _same(),
        "ref_model_mixup_alpha": _same(),
        "use_liger_kernel": _unneeded("LM head and loss run fused, by kernels of this project, wherever a trial shows "
                                      "no difference"),
        "liger_kernel_config": _unneeded("see use_liger_kernel"),
    },
    "Optimiser": {
        "learning_rate": _same(),
        "optim": _same("names of TRL: " + ", ".join(f"`{name}`" for name in aliases.CHOSEN["optim"][1])),
        "optim_args": _other("--model.optimizer.eps=1e-6", "options of the optimiser's class"),
        "optim_target_modules": _refused("GaLore and its kin are not here"),
        "weight_decay": _same("of matrices alone, never of norms and biases, as with TRL"),
        "adam_beta1": _other("--model.optimizer.betas=[0.9,0.999]", "both at once"),
        "adam_beta2": _other("--model.optimizer.betas=[0.9,0.999]", "both at once"),
        "adam_epsilon": _same(),
        "max_grad_norm": _same(),
        "lr_scheduler_type": _same("linear, cosine or constant; default cosine, with TRL linear"),
        "lr_scheduler_kwargs": _refused("the three schedules have no options"),
        "warmup_steps": _same("as a share of all steps, below 1; default 0.1, with TRL 0"),
    },
    "Precision and memory": {
        "bf16": _same("default off, with TRL on"),
        "fp16": _same(),
        "bf16_full_eval": _unneeded("validation runs in the precision of training"),
        "fp16_full_eval": _unneeded("validation runs in the precision of training"),
        "tf32": _refused("float32 products are exact here; bf16 is the fast way"),
        "gradient_checkpointing": _same("default off, with TRL on: a third more time for less memory"),
        "no_gradient_checkpointing": _same(),
        "gradient_checkpointing_kwargs": _unneeded("checkpointing is the non-reentrant one"),
        "activation_checkpointing": _other("--model.gradient_checkpointing=true"),
        "activation_checkpointing_kwargs": _unneeded("checkpointing is the non-reentrant one"),
        "activation_offloading": _same("of the layers, on a GPU; with gradient_checkpointing, their inputs alone"),
        "torch_compile": _same("compiles layer by layer"),
        "torch_compile_backend": _same(),
        "torch_compile_mode": _refused("layers are compiled in the default mode"),
        "torch_empty_cache_steps": _refused("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True is the remedy for "
                                            "fragments"),
        "eval_accumulation_steps": _unneeded(_PARTS),
    },
    "Evaluation and logging": {
        "eval_strategy": _other("--trainer.val_check_interval=0.25", "share of an epoch; validation always runs before "
                                "and after training. none: --data.held_out_fraction 0"),
        "eval_steps": _other("--trainer.val_check_interval=400", "in micro-batches: TRL's optimiser steps times "
                             "--gradient_accumulation_steps"),
        "eval_delay": _unneeded("the first point of every curve is the policy before training"),
        "eval_on_start": _unneeded("validation runs before training anyway"),
        "prediction_loss_only": _unneeded(_PARTS),
        "eval_do_concat_batches": _unneeded(_PARTS),
        "eval_use_gather_object": _unneeded(_PARTS),
        "include_for_metrics": _unneeded(_PARTS),
        "batch_eval_metrics": _unneeded(_PARTS),
        "logging_strategy": _other("--trainer.log_every_n_steps=10", "in optimiser steps"),
        "logging_steps": _same("whole steps; default 5, fewer in short runs"),
        "logging_first_step": _unneeded("the first step's loss is checked and logged"),
        "logging_nan_inf_filter": _refused("a loss that is not finite ends the run with its rows"),
        "log_on_each_node": _unneeded("rank 0 logs"),
        "log_level": _unneeded(_LOG),
        "log_level_replica": _unneeded(_LOG),
        "include_num_input_tokens_seen": _unneeded("train/tokens_per_second and train/padding_share are logged"),
        "disable_tqdm": _other("--trainer.enable_progress_bar=false"),
        "report_to": _same("csv (default), tensorboard, wandb, mlflow, trackio or none"),
        "run_name": _other("--trainer.logger.name=NAME", "of the logger that was chosen"),
        "project": _other("--trainer.logger=lightning.pytorch.loggers.WandbLogger --trainer.logger.project=NAME"),
        "trackio_space_id": _other(f"{_TRACKIO} --trainer.logger.space_id=OWNER/NAME"),
        "trackio_bucket_id": _other(
            f"{_TRACKIO} --trainer.logger.space_id=OWNER/NAME --trainer.logger.bucket_id=OWNER/BUCKET"
        ),
        "trackio_static_space_id": _refused("trackio's own `trackio sync --sdk static` makes one, after the run"),
        "skip_memory_metrics": _other("--dry_run=true", "says what memory is needed, by kind"),
        "debug": _refused("a loss or gradient that is not finite ends the run and says which rows made it"),
    },
    "Checkpoints and the result": {
        "output_dir": _same("folder of all runs, each in `version_N` below it; of one run with `--report_to` none, "
                            "wandb or mlflow, which have no such folders"),
        "save_strategy": _other(_EVERY, "last.ckpt, from which one resumes, is written at validations, and so are the "
                                "best weights without these options"),
        "save_steps": _other(_EVERY, "keeps the weights of all these steps; without it, the best of all validations"),
        "save_total_limit": _other("--checkpoint.save_top_k=2", "the best ones, beside last.ckpt"),
        "save_only_model": _other("--checkpoint.save_weights_only=true", "of the best steps, which is the default"),
        "save_on_each_node": _unneeded("a run has one folder, which all nodes see"),
        "enable_jit_checkpoint": _unneeded("a signal finishes the step, saves and stops"),
        "load_best_model_at_end": _same(),
        "metric_for_best_model": _other("--checkpoint.monitor=held_out/accuracy --checkpoint.mode=max",
                                        "names as in metrics.csv; default held_out/loss"),
        "greater_is_better": _same(),
        "resume_from_checkpoint": _same("`last`: the newest; the resumed run ends in the same bits"),
        "ignore_data_skip": _refused("a resumed run sees the pairs that the other one had not seen"),
        "restore_callback_states_from_checkpoint": _unneeded("the whole state is always restored"),
    },
    "The hub": {
        "push_to_hub": _same("with the repository's name; the exported model and its card, once, after training"),
        "hub_model_id": _other("--push_to_hub=OWNER/NAME"),
        "hub_token": _refused("a token belongs in no command line: hf auth login, or HF_TOKEN"),
        "hub_private_repo": _same("default true"),
        "hub_strategy": _refused("the model is uploaded once, after training; checkpoints never are"),
        "hub_always_push": _refused("the model is uploaded once, after training"),
        "hub_revision": _refused("the model goes to the main branch"),
    },
    "Seeds and devices": {
        "seed": _same(),
        "data_seed": _other("--data.seed=1", "of the held-out part; --seed seeds the order of training"),
        "full_determinism": _same(),
        "use_cpu": _same(),
        "num_processes": _same("of Accelerate: devices of this machine"),
        "accelerate_config": _other("--trainer.strategy=fsdp2", "multi_gpu is ddp; configs/ has files for one node and "
                                    "for many"),
        "fsdp": _other("--trainer.strategy=fsdp2"),
        "fsdp_config": _other(f"{_SHARDED} --trainer.strategy.tensor_parallel_size=2",
                              "each rank reads its own part of the weights; offload_params is cpu_offload"),
        "deepspeed": _other("--trainer.strategy=deepspeed_stage_3", "wired up, and never run"),
        "parallelism_config": _other(f"{_SHARDED} --trainer.strategy.tensor_parallel_size=2",
                                     "tp_size; for sp_size and cp_size, context_parallel_size"),
        "ddp_find_unused_parameters": _unneeded("every trained weight is used in every step"),
        "ddp_bucket_cap_mb": _other(f"{_DDP}bucket_cap_mb=50"),
        "ddp_broadcast_buffers": _other(f"{_DDP}broadcast_buffers=false"),
        "ddp_static_graph": _other(f"{_DDP}static_graph=true"),
        "ddp_backend": _other(f"{_DDP}process_group_backend=gloo"),
        "ddp_timeout": _other(f"{_DDP}timeout=01:00:00"),
        "local_rank": _unneeded("launchers say it by the environment"),
        "do_train": _unneeded("`fit` trains, `evaluate` evaluates"),
        "do_eval": _unneeded("`fit` validates on what is held out"),
        "do_predict": _unneeded("`evaluate` asks models for answers"),
    },
}  # fmt: skip
"""Every option of TRL's DPOConfig, ScriptArguments and ModelConfig, and Accelerate's two common ones, by topic."""

_OWN = ("push_to_hub", "hub_private_repo")
"""Options of ours that have TRL's name."""

ROWS = {name: row for group in GROUPS.values() for name, row in group.items()}


def answer(name: str) -> str | None:
    """Return what to say to someone who gives TRL's option `name`; None for one that is accepted or unknown."""
    row = ROWS.get(name)
    if row is None or row.kind == "same":
        return None
    if row.kind == "other":
        return f"--{name} is TRL's name; here it is {row.here}" + (f" ({row.remark})" if row.remark else "")
    if row.kind == "unneeded":
        return f"--{name} of TRL is not needed: {row.remark}; leave it out"
    return f"--{name} of TRL is not here: {row.remark}"


def here(name: str) -> str:
    """Return our options for TRL's `name`; empty where there are none."""
    row = ROWS[name]
    if row.kind != "same":
        return row.here
    if name in _OWN:
        return f"--{name}"
    if name in aliases.SHORT:
        return f"--{aliases.SHORT[name]}"
    return f"--{aliases.CHOSEN[name][0]}" if name in aliases.CHOSEN else ""


_KINDS = {"same": "same name", "other": "other name", "unneeded": "not needed", "refused": "not here"}


def table() -> str:
    """Return the rows of docs/coming_from_trl.md, a table for each topic."""
    lines: list[str] = []
    for topic, rows in GROUPS.items():
        lines += [f"### {topic}", "", "| TRL | | here | |", "|---|---|---|---|"]
        for name, row in rows.items():
            ours = f"`{here(name)}`" if here(name) else ""
            # An option is code, unless it is in code already.
            remark = re.sub(r"(`[^`]*`)|(?<!\w)(--[\w.]+)", lambda m: m[1] or f"`{m[2]}`", row.remark)
            remark = remark.replace("|", "\\|")
            lines.append(f"| `{name}` | {_KINDS[row.kind]} | {ours} | {remark} |")
        lines.append("")
    return "\n".join(lines)


def written(page: str) -> str:
    """Return `page` with the table put between its two marks."""
    before, _, rest = page.partition(_BEGIN)
    return before + _BEGIN + "\n" + table() + "\n" + _END + rest.partition(_END)[2]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
