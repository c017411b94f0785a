"""What each of two ranks does in the tests of tied weights in checkpoints; rank 0 writes what it finds to `folder`."""

from functools import partial

from sharded_jobs import train
from sharded_ranks import checkpoint_at, keep
from training import fused_adamw

from bdpo_pl.training.schedule_free import ScheduleFreeAdamW

OPTIMIZERS = {"adamw": fused_adamw, "free": partial(ScheduleFreeAdamW, lr=5e-3, weight_decay=0.1, eps=1e-6)}
STRATEGIES = ("fsdp2", "tp")


def job(folder, name, ranks, kind, **options):
    options |= {"optimizer": OPTIMIZERS[kind], "lr_schedule": "constant", "trainer": {"max_epochs": 1}}
    return train(folder, f"{name}-{kind}", ranks, cache="fsdp2" if ranks > 1 else "one", **options)


def saved(folder, name, ranks, kind):
    """Train with a checkpoint of the step in the middle."""
    return job(folder, name, ranks, kind, callbacks=[checkpoint_at(folder, f"{name}-{kind}", 2)])


def checkpoint(folder, name, kind):
    return folder / f"{name}-{kind}-steps" / "step=2.ckpt"


def runs(rank, folder):
    """A run of each strategy, and one that goes on from a checkpoint of one device."""
    for kind in OPTIMIZERS:
        for name in STRATEGIES if kind == "adamw" else STRATEGIES[:1]:
            saved(folder, name, 2, kind)
        again = job(folder, "fsdp2-from-one", 2, kind, ckpt_path=str(checkpoint(folder, "one", kind)))
        keep(rank, folder, f"fsdp2-from-one-{kind}", again)
