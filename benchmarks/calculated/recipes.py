"""Calculated needs of the paper's runs: `python -m benchmarks.calculated.recipes` writes `docs/recipes.md`.

Nothing here is measured. Memory is the plan that `--dry_run true` prints for the shipped configurations; time is
operations at rates, and lengths of text, that the page states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bdpo_pl.models.adapters import LoraOptions
from bdpo_pl.models.loading import ModelSource
from bdpo_pl.training.memory_plan import MemoryPlan, plan_memory
from bdpo_pl.training.optim import adamw
from bdpo_pl.training.parameter_counts import Devices
from bdpo_pl.training.planned_batches import worst_batch
from benchmarks.calculated.kernels import H100
from benchmarks.calculated.scaling import GIB, PEAK_FLOPS, SHARE
from benchmarks.pages import render
from benchmarks.study.real.cell import HELD_OUT, MAX_NEW_TOKENS
from benchmarks.study.real.plan import HALVES, METHODS, SEEDS, Cell, tuning

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
PAIRS = 20_000
WINDOW = 1024
# For orientation: tokens of a prompt in its chat template and of a response. `fit` prints your data's.
PROMPT, RESPONSE = 50, 90
# The study on a real model: pairs that a cell trains on, its prompts, its cells; prompts answered side by side.
TRAINED, PROMPTS, AT_ONCE = Cell.num_pairs, 763, 32
CELLS = 1 + len(tuning()) + len(METHODS) * len(SEEDS) + len(HALVES) * len(SEEDS)
# Bytes a second from and to a disk, an assumption.
DISK = 2e9


@dataclass(frozen=True)
class Recipe:
    """One of the paper's models.

    Attributes:
        name: name on the hub.
        config: shipped file of the run on eight GPUs.
        architecture: architecture in transformers.
        sizes: published sizes of its configuration.
    """

    name: str
    config: str
    architecture: str
    sizes: dict[str, Any]

    def model_config(self) -> Any:
        """Return the configuration, without the hub."""
        return AutoConfig.for_model(
            self.architecture, **self.sizes, tie_word_embeddings=False, attn_implementation="sdpa"
        )

    def parameters(self) -> tuple[int, int]:
        """Return the number of all parameters, and that of the embedding."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.model_config())
        return sum(p.numel() for p in model.parameters()), model.get_input_embeddings().weight.numel()


RECIPES = (
    Recipe(
        "Qwen/Qwen2-7B-Instruct", "paper_qwen2_7b.yaml", "qwen2",
        {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
         "num_key_value_heads": 4, "vocab_size": 152_064, "max_position_embeddings": 32_768},
    ),
    Recipe(
        "mistralai/Mistral-7B-Instruct-v0.3", "paper_mistral_7b.yaml", "mistral",
        {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 32_768, "max_position_embeddings": 32_768, "sliding_window": None},
    ),
    Recipe(
        "lmsys/vicuna-7b-v1.5", "paper_vicuna_7b.yaml", "llama",
        {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 32, "vocab_size": 32_000, "max_position_embeddings": 4096},
    ),
)  # fmt: skip


def plan(recipe: Recipe, gpus: int) -> MemoryPlan:
    """Plan the memory of each of `gpus`: one trains adapters of rank 16, several train all weights, sharded."""
    alone = gpus == 1
    half = torch.bfloat16
    return plan_memory(
        ModelSource(recipe.name),
        recipe.model_config(),
        worst_batch(8_192 * 2 // (3 * WINDOW) if alone else 8, WINDOW, shared=True),
        half if alone else torch.float32,
        adamw,
        Devices(gpus, 1, not alone, "cuda"),
        lora=LoraOptions() if alone else None,
        gradient_checkpointing=True,
        half_products=half,
    )


def hours(recipe: Recipe, gpus: int) -> tuple[float, float]:
    """Return the hours of (an epoch over all pairs, the scoring pass before it), from operations alone.

    Training: forward, recomputation, and a backward pass of two products, or one for frozen weights; the LM head once
        less. Scoring: a forward pass over each prompt and its two responses, and one over the responses after the null
        prompt.
    """
    everything, embedding = recipe.parameters()
    passes = 3 if gpus == 1 else 4
    row, scored = PROMPT + 2 * RESPONSE, 2 * RESPONSE
    body = 2 * (everything - 2 * embedding)
    training = PAIRS * (passes * body * row + (passes - 1) * 2 * embedding * scored)
    scoring = PAIRS * (body * (row + scored) + 2 * 2 * embedding * scored)
    rate = gpus * PEAK_FLOPS * SHARE * 3600
    return training / rate, scoring / rate


@dataclass(frozen=True)
class CellCost:
    """Seconds of one cell of the study on a real model: adapters of a recipe's model, one H100.

    Attributes:
        training: an epoch over its pairs.
        scoring: training and held-out pairs, before and after.
        answers: answers to the prompts, for each of whose tokens all weights are read once.
        weights: the weights from the disk twice, and to it once.
    """

    training: float
    scoring: float
    answers: float
    weights: float


def cell_cost(recipe: Recipe) -> CellCost:
    """Return what a cell of the study on a real model takes; every one counted as if it asked the prompts."""
    training, scoring = (3600 * one / PAIRS for one in hours(recipe, 1))
    size = 2 * recipe.parameters()[0]
    return CellCost(
        TRAINED * training,
        2 * (TRAINED + HELD_OUT) * scoring,
        math.ceil(PROMPTS / AT_ONCE) * MAX_NEW_TOKENS * size / H100.bandwidth,
        3 * size / DISK,
    )


def row(recipe: Recipe, gpus: int) -> str:
    """Return one line of the page's table."""
    memory, (training, scoring) = plan(recipe, gpus), hours(recipe, gpus)
    how = "LoRA, rank 16" if gpus == 1 else "all weights, FSDP2"
    return f"| {recipe.name} | {gpus} | {how} | {memory.peak / GIB:.1f} | {60 * training:.1f} | {60 * scoring:.1f} |"


def page() -> str:
    """Return the whole page."""
    commands = "\n".join(f"python -m bdpo_pl.fit --config configs/{recipe.config}" for recipe in RECIPES)
    table = "\n".join(row(recipe, gpus) for recipe in RECIPES for gpus in (1, 8))
    return render(
        Path(__file__).with_name("recipes.md.j2"),
        commands=commands,
        table=table,
        window=WINDOW,
        share=SHARE,
        peak=PEAK_FLOPS,
        pairs=PAIRS,
        prompt=PROMPT,
        response=RESPONSE,
        trained=TRAINED,
        held_out=HELD_OUT,
        prompts=PROMPTS,
        at_once=AT_ONCE,
        tokens=MAX_NEW_TOKENS,
        cells=CELLS,
        disk=DISK,
        bandwidth=H100.bandwidth,
        size=2 * RECIPES[1].parameters()[0],
        cost=cell_cost(RECIPES[1]),
        model=RECIPES[1].name,
    )


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
