"""Speed of greedy generation: `python -m benchmarks.generation --model FOLDER --suite NAME=FILE`.

The prompts of a safety suite, in the model's chat template, are answered in continuous batches, by `generate` of
transformers in padded batches in the order of the file, the same sorted by length, and by its own continuous batching.
All have the same model, in turns, so that a drift of the machine meets all. On a CPU that others use too, tokens per
second of processor time say more than those per second; with one thread, no time is lost waiting for another. `--alone`
compares every answer with that of the prompt alone, token for token. `--server` asks an OpenAI-compatible server on
the same machine too, by the client that `evaluate` has; only the time by the clock can be compared, and its weights may
have another precision. No text is printed or written.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bdpo_pl.evaluation.chat.endpoint import Endpoint, EndpointOptions
from bdpo_pl.evaluation.suites.known import load_suite
from bdpo_pl.forward.decoding import Decoder
from bdpo_pl.forward.decoding_trial import why_not_continuous
from bdpo_pl.forward.generation import (
    Generated,
    encode_prompts,
    in_continuous_batches,
    in_padded_batches,
    padded,
    stop_ids,
)
from bdpo_pl.models.loading import ModelSource, load_model, load_tokenizer
from benchmarks.machine import machine
from benchmarks.written import write_rows

_RESULTS = Path(__file__).parent / "results"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Tokens = dict[int, list[int]]
"""Generated tokens by the number of the prompt, without the stop token."""

CONTINUOUS, FILE_ORDER, SORTED, LIBRARY = (
    "continuous batches", "generate, file order", "generate, sorted", "transformers' generate_batch",
)  # fmt: skip
FIRST = (CONTINUOUS, FILE_ORDER, SORTED)
SERVER = "server"


def tokens_of(generated: Iterable[Generated]) -> Tokens:
    """Collect what is generated."""
    return {number: tokens for number, tokens, _ in generated}


def by_library(
    model: Any, prompts: Sequence[list[int]], *, max_new_tokens: int, stops: set[int], pad_id: int
) -> Tokens:
    """Answer by the continuous batching of transformers."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(stops), pad_token_id=pad_id
    )
    outputs = model.generate_batch(inputs=list(prompts), generation_config=config, progress_bar=False)
    found: Tokens = {}
    for number, output in enumerate(outputs.values()):
        written = list(output.generated_tokens)
        found[number] = written[:-1] if written and written[-1] in stops else written
    return found


def by_server(url: str, prompts: Sequence[str], max_new_tokens: int, parallel: int) -> Tokens:
    """Have a server answer; of its tokens it tells the number alone, and each is 0 here."""
    endpoint = Endpoint(EndpointOptions(url, "benchmark", max_tokens=max_new_tokens, parallel=parallel))
    answers = endpoint.completions([[{"role": "user", "content": prompt}] for prompt in prompts])
    return {number: [0] * answer.num_tokens for number, answer in enumerate(answers)}


def markdown(row: dict[str, Any]) -> str:
    """Return the result as a table: a line for each way of generation."""
    lines = [
        "| generation | batch | tokens/s, by turn | × file order | tokens/s of processor time | × | answers as alone |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in row["tokens_per_s"]:
        same = f"{row['as_alone'][name]} of {row['prompts']}" if name in row["as_alone"] else ""
        cells = [name, row["batch"].get(name, "")]
        for key in ("tokens_per_s", "tokens_per_cpu_s"):
            speeds, others = row[key].get(name, []), row[key].get(FILE_ORDER, [])
            ratios = [speed / other for speed, other in zip(speeds, others, strict=False)]
            cells += [", ".join(f"{speed:.0f}" for speed in speeds)]
            cells += [f"{statistics.median(ratios):.2f}" if ratios else ""]
        lines.append(f"| {' | '.join(map(str, cells))} | {same} |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--suite", required=True, help="suite, as in bdpo_pl.evaluate: NAME, NAME=FILE")
    parser.add_argument("--prompts", type=int, default=64, help="prompts, evenly spread over the suite")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64, help="of the continuous and of the sorted batches")
    parser.add_argument("--plain-batch-size", type=int, default=8, help="of the batches in the order of the file")
    parser.add_argument("--ways", nargs="+", choices=(*FIRST, LIBRARY), default=FIRST)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--server", help="address of a server of the same model, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--server-parallel", type=int, default=8, help="simultaneous requests to it")
    parser.add_argument("--alone", action="store_true", help="compare with the answer to each prompt alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32")
    parser.add_argument("--out", type=Path, default=_RESULTS)
    parser.add_argument("--tag", default="", help="goes into the result's name")
    options = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC)
    told = machine(options.device)  # now, because the commit may be another one at the end
    tokenizer = load_tokenizer(ModelSource(options.model))
    model = load_model(ModelSource(options.model), _DTYPES[options.dtype]).to(options.device).eval()
    suite = load_suite(options.suite, options.prompts)
    prompts = encode_prompts(tokenizer, [prompt.text for prompt in suite.prompts])
    stops = stop_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops)
    given: dict[str, Any] = {"max_new_tokens": options.new_tokens, "stops": stops, "pad_id": pad_id}

    def in_batch(rows: Sequence[list[int]]) -> list[tuple[list[int], bool]]:
        return padded(model, tokenizer, rows, **given)

    handed_back: list[int] = []

    def alone_again(rows: Sequence[list[int]]) -> list[tuple[list[int], bool]]:
        handed_back[-1] += len(rows)
        return in_batch(rows)

    def continuous() -> Tokens:
        handed_back.append(0)
        decoder = Decoder(model, stops, max_new_tokens=options.new_tokens, num_slots=options.batch_size)
        return tokens_of(in_continuous_batches(decoder, alone_again, prompts))

    def plain(order: Sequence[int], size: int) -> Tokens:
        return tokens_of(in_padded_batches(in_batch, prompts, order, size))

    file_order = list(range(len(prompts)))
    by_length = sorted(file_order, key=lambda i: len(prompts[i]))
    ways: dict[str, Callable[[], Tokens]] = {
        CONTINUOUS: continuous,
        FILE_ORDER: partial(plain, file_order, options.plain_batch_size),
        SORTED: partial(plain, by_length, options.batch_size),
        LIBRARY: partial(by_library, model, prompts, **given),
    }
    names = list(options.ways)
    if options.server:
        texts = [prompt.text for prompt in suite.prompts]
        ways[SERVER] = partial(by_server, options.server, texts, options.new_tokens, options.server_parallel)
        names.append(SERVER)
    speeds: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names if name != SERVER}
    answers: dict[str, Tokens] = {}
    with torch.no_grad():
        trial = time.perf_counter()
        objection = why_not_continuous(model, prompts, options.new_tokens, pad_id)
        trial = time.perf_counter() - trial
        if objection is not None and CONTINUOUS in options.ways:
            raise SystemExit(f"{options.model}: {objection}")
        for number in range(options.rounds):
            for name in names if number % 2 == 0 else names[::-1]:
                begun = time.perf_counter(), time.process_time()
                answers[name] = ways[name]()
                tokens = sum(map(len, answers[name].values()))
                speeds[name].append(tokens / (time.perf_counter() - begun[0]))
                told_now = f"{speeds[name][-1]:.1f} tokens/s"
                if name in processor:
                    processor[name].append(tokens / (time.process_time() - begun[1]))
                    told_now += f", {processor[name][-1]:.1f} of processor time"
                print(f"turn {number + 1}: {name}: {told_now}", flush=True)
        alone = plain(file_order, 1) if options.alone else None
    row = {
        "model": Path(options.model).name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": options.dtype,
        "suite": suite.name,
        "prompts": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "new_tokens": options.new_tokens,
        "generated": {name: sum(map(len, tokens.values())) for name, tokens in answers.items()},
        "batch": {CONTINUOUS: options.batch_size, FILE_ORDER: options.plain_batch_size, SORTED: options.batch_size},
        "trial_s": trial,
        "tokens_per_s": speeds,
        "tokens_per_cpu_s": processor,
        "decided_alone": handed_back,
        "as_alone": {}
        if alone is None
        else {name: sum(answers[name][i] == alone[i] for i in alone) for name in processor},
    }
    tag = f"-{options.tag}" if options.tag else ""
    stem = f"{options.device}-generation{tag}"
    path = write_rows(options.out, stem, "benchmarks.generation", started, told, [row])
    print(markdown(row))
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
