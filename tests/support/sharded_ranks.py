"""What each of two ranks does in the tests of strategies; rank 0 writes what it finds to `folder`."""

from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sharded_jobs import train, with_intervals

from bdpo_pl.errors import InputError
from bdpo_pl.losses import BalancedDPOLoss, DPOLoss, LDLoss
from bdpo_pl.models.adapters import LoraOptions
from bdpo_pl.training.adafactor import Adafactor
from bdpo_pl.training.optimizers import Muon
from bdpo_pl.training.schedule_free import ScheduleFreeAdamW

LORA = LoraOptions(r=4, alpha=8)
SHORT = {"trainer": {"max_epochs": 1}}
RUNS = {
    "ddp": {},
    "fsdp2": {},
    "fsdp2-checkpointing": {"gradient_checkpointing": True, **SHORT},
    "fsdp2-logits": {"lm_head": "logits", "prefix_sharing": "never", **SHORT},
    "fsdp2-accumulating": {"trainer": {"accumulate_grad_batches": 2, "max_epochs": 1}, "sharing": 4},
    "tp": SHORT,
    "tp-logits": {"lm_head": "logits", **SHORT},
    "context": SHORT,
    "context-logits": {"lm_head": "logits", "prefix_sharing": "never", "gradient_checkpointing": True, **SHORT},
    "context-dpo": {"loss": DPOLoss(), **SHORT},
    # Its log-probabilities are of parts of responses, and it is fused with the head here.
    "context-ld": {"loss": LDLoss(BalancedDPOLoss()), **SHORT},
    "ddp-lora": {"lora": LORA, **SHORT},
    "fsdp2-lora": {"lora": LORA, **SHORT},
    "context-lora": {"lora": LORA, **SHORT},
    "fsdp2-pissa": {"lora": LoraOptions(r=4, init="pissa"), **SHORT},
    "fsdp2-dora": {"lora": LoraOptions(r=4, dora=True, modules_to_save=["lm_head"]), **SHORT},
}
# The same eps as that of `training.adamw`, for the same reason.
KINDS = {"muon": (Muon, {}), "adafactor": (Adafactor, {}), "free": (ScheduleFreeAdamW, {"eps": 1e-6})}
OPTIMIZED = {
    f"fsdp2-{name}": {"optimizer": partial(kind, lr=5e-3, weight_decay=0.1, **options), "lr_schedule": "constant"}
    # The average is left again after a validation, so this one goes on after one.
    | ({} if name == "free" else SHORT)
    for name, (kind, options) in KINDS.items()
}
RESUMED = {
    **OPTIMIZED,
    "fsdp2": {},
    "tp": SHORT,
    "fsdp2-lora": {"lora": LORA, **SHORT},
    "ddp-lora": {"lora": LORA, **SHORT},
    "fsdp2-vision": {"model": "vision", **SHORT},
}
INTERRUPTED = ("fsdp2",)
"""Resumed after an error; the others from a checkpoint that the uninterrupted run left on its way."""
SCORED_AS = {
    **dict.fromkeys(["fsdp2-checkpointing", "fsdp2-accumulating", *OPTIMIZED], "fsdp2"),
    **dict.fromkeys(["fsdp2-pissa", "fsdp2-dora"], "fsdp2-lora"),
    "tp-from-fsdp2": "tp",
    "context-dpo": "context",
}
"""The same scores as in a run before: they are read from its cache."""
FROM_ADAPTER = ("ddp-adapter", "fsdp2-adapter")


def from_adapter(folder):
    return {"lora": LoraOptions(adapter=str(folder / "sft")), **SHORT}


OTHER_MODELS = {
    "ddp-vision": "vision",
    "fsdp2-vision": "vision",
    "fsdp2-experts": "experts",
    "tp-llama": "llama",
    "tp-mistral": "mistral",
    "tp-tied": "tied",
    "fsdp2-tied": "tied",
    "context-odd": "odd",
    "context-vision": "vision",
}


def every_strategy(rank, folder):
    for name, options in (RUNS | OPTIMIZED).items():
        keep(rank, folder, name, once(folder, name, **options))
    for name in FROM_ADAPTER:
        keep(rank, folder, name, once(folder, name, **from_adapter(folder)))
    for name, model in OTHER_MODELS.items():
        keep(rank, folder, name, once(folder, name, model=model, **SHORT))


def once(folder, name, **options):
    steps = [checkpoint_at(folder, name, resumed_at(options))] if name in RESUMED.keys() - set(INTERRUPTED) else []
    return train(folder, name, 2, cache=SCORED_AS.get(name), callbacks=steps, **options)


def resumed_at(options):
    """The step in the middle of the last epoch: 4 steps an epoch."""
    return 2 if "trainer" in options else 6


def checkpoint_at(folder, name, step):
    return ModelCheckpoint(folder / f"{name}-steps", every_n_train_steps=step, save_top_k=-1, filename="{step}")


def two_groups_of_two(rank, folder):
    """Two groups of ranks with different pairs, each of which shares its rows."""
    keep(rank, folder, "context-groups", train(folder, "context-groups", 4, **SHORT))


def keep(rank, folder, name, result):
    state, evaluations, module = with_intervals(result)
    whole = sum(p.numel() for p in module.policy.parameters())
    held = sum(getattr(p, "_local_tensor", p).numel() for p in module.policy.parameters())
    if rank == 0:
        torch.save((state, evaluations, held / whole), folder / f"{name}.pt")


class StopAt(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("the machine is gone")


def interrupted_and_resumed(rank, folder):
    for name, options in RESUMED.items():
        done = resumed_at(options)
        cache = SCORED_AS.get(name, name)
        if name in INTERRUPTED:
            callbacks = [checkpoint_at(folder, name, done), StopAt(done + 1)]
            with pytest.raises(RuntimeError, match="machine is gone"):
                train(folder, name + "-part", 2, cache=cache, callbacks=callbacks, **options)
        path = str(folder / f"{name}-steps" / f"step={done}.ckpt")
        again = train(folder, name + "-again", 2, cache=cache, ckpt_path=path, **options)
        keep(rank, folder, name + "-resumed", again)
    path = str(folder / "fsdp2-steps" / "step=6.ckpt")
    again = train(folder, "tp-from-fsdp2", 2, cache=SCORED_AS["tp-from-fsdp2"], ckpt_path=path)
    keep(rank, folder, "tp-from-fsdp2", again)


def what_does_not_fit_is_refused(rank, folder):
    for name, options, fault in (
        ("tp", {"lora": LORA}, "not with tensor parallelism"),
        ("tp", {"model": "gpt2"}, "gpt2 model, and only cohere"),
        ("tp", {"model": "odd"}, "does not divide the 1 of num_key_value_heads"),
        ("tp", {"optimizer": Muon, "lr_schedule": "constant"}, "set tensor_parallel_size to 1: take AdamW"),
        ("fsdp2", {"lora": LORA, "reference_mode": "live"}, "set it to precomputed"),
        (
            "context",
            {"reference_mode": "live"},
            "live does not work with .*context_parallel_size 2.*; set it to precom",
        ),
        ("context", {"compile": "eager"}, "model.compile does not work with .*; leave it out, or set context_parallel"),
        ("context", {"model": "experts", "router_aux_loss": 0.1}, "model.router_aux_loss does not work with"),
    ):
        with pytest.raises(InputError, match=fault):
            train(folder, f"{name}-refused", 2, **options)


def everything(rank, folder):
    every_strategy(rank, folder)
    interrupted_and_resumed(rank, folder)
    what_does_not_fit_is_refused(rank, folder)
