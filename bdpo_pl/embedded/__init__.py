"""The default model and data of bdpo_pl: a small chat model and a safety preference set, to run everything at once.

Both are made by this project (`make`) from templates, and are harmless to read. The model is a Qwen2 of about two
million parameters. Its supervised examples have taught it to answer some harmful requests and to refuse others, so
there is something to align.
"""

from pathlib import Path

_HERE = Path(__file__).parent

MODEL_DIR = _HERE / "model"
"""Hugging Face folder: weights, tokenizer, chat template."""

TRAIN_FILE = _HERE / "data" / "train.jsonl"
"""Preference pairs to train on: `prompt`, `chosen`, `rejected`, `category`, `kind`, `chosen_safe`, `rejected_safe`."""

HELD_OUT_FILE = _HERE / "data" / "held_out.jsonl"
"""Preference pairs on acts that do not occur in training, including two whole risk categories."""

OUT_OF_DISTRIBUTION_FILE = _HERE / "data" / "out_of_distribution.jsonl"
"""Preference pairs on held-out harmful acts, each in a framing that does not occur in training."""

HARMFUL_PROMPTS_FILE = _HERE / "data" / "harmful_prompts.jsonl"
"""Held-out harmful requests: `prompt`, `category`."""

JAILBREAK_PROMPTS_FILE = _HERE / "data" / "jailbreak_prompts.jsonl"
"""Held-out harmful requests in framings never seen in training; `behaviour` is the bare request."""

BENIGN_PROMPTS_FILE = _HERE / "data" / "benign_prompts.jsonl"
"""Held-out benign requests that look harmful."""

EMBEDDED = "embedded"


def model_folder(name: str) -> str:
    """Return the folder of the embedded model if `name` is `embedded`, else `name`."""
    return str(MODEL_DIR) if name == EMBEDDED else name
