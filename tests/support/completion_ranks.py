"""What each rank does in the test of completions."""

import json

from sharded_jobs import train

from bdpo_pl.training.completions import LogCompletions
from bdpo_pl.training.safety_probe import SafetyProbe


def completed(rank, folder, name, size):
    """A short run with completions of held-out prompts and the safety probe's answers; `rank` None: one process."""
    # In this order a completion of the first rank is under way while the other waits at the probe's sum.
    callbacks = [LogCompletions(3, max_new_tokens=4), SafetyProbe(str(folder / "harmful.jsonl"), max_new_tokens=3)]
    train(folder, name, size, callbacks=callbacks, trainer={"max_epochs": 1}, cache="completions")


def completions(folder):
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().split("\n")[:-1]]
