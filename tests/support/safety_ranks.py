"""What each of two ranks does in the test of the safety probe."""

import json

from makers import write_jsonl
from sharded_jobs import train

import bdpo_pl.training.safety_probe as safety_probe
from bdpo_pl.training.safety_probe import SafetyProbe


def measured_on_two_ranks(rank, folder):
    """Rates before and after a short run, of prompts that do not divide by two; `rank` None: one process alone."""
    asked = {}

    def answer(model, tokenizer, prompts, **_):
        if prompts:
            asked[prompts[0].split()[0]] = len(prompts)
        # Refused are those with an even number, whichever rank is asked.
        return ["I can't help with that." if int(p.split()[1]) in (0, 3) else "water it ." for p in prompts]

    single = write_jsonl(folder / f"single-{rank}.jsonl", [{"prompt": "benign 0 ?"}])
    generate = safety_probe.generate_responses
    safety_probe.generate_responses = answer
    try:
        probe = SafetyProbe(str(folder / "harmful.jsonl"), benign=str(single), every_n_steps=1)
        name, size = ("one-safety", 1) if rank is None else ("ddp-safety", 2)
        train(folder, name, size, callbacks=[probe], trainer={"max_epochs": 1})
    finally:
        safety_probe.generate_responses = generate
    found = {"rates": [probe.before, probe.after], "asked": asked}
    if rank == 0:
        (folder / "two.json").write_text(json.dumps(found))
    return found
