"""The paper's runs: each shipped configuration at tiny size, the page's numbers by hand, and the page in docs/."""

from pathlib import Path

import pytest
import yaml
from makers import build_model, build_tokenizer, safe_rlhf_row, write_jsonl
from transformers import AutoModelForCausalLM

from bdpo_pl.fit import main
from benchmarks.calculated.recipes import CELLS, PAGE, RECIPES, cell_cost, hours, page

ROOT = Path(__file__).parents[3]
WORDS = ("water", "set", "keep", "ask", "read", "trap", "find", "poison", "help", "do", "it", "with")
# As their cards have them: 7.62, 7.25 and 6.74 billion.
PARAMETERS = {"qwen2": 7_615_616_512, "mistral": 7_248_023_552, "llama": 6_738_415_616}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.architecture)
def test_sizes_are_the_published_ones(recipe):
    assert recipe.parameters()[0] == PARAMETERS[recipe.architecture]


def test_operations_by_hand():
    recipe = RECIPES[2]
    # 20,000 pairs of 230 tokens, 180 of them scored, by a quarter of 989 TFLOP/s × 0.4 × 8 GPUs and so on.
    body, embedding = 6_738_415_616 - 2 * 32_000 * 4096, 32_000 * 4096
    training = 20_000 * (8 * body * 230 + 6 * embedding * 180)
    scoring = 20_000 * (2 * body * (230 + 180) + 4 * embedding * 180)
    rate = 8 * 989e12 * 0.4 * 3600
    assert hours(recipe, 8) == pytest.approx((training / rate, scoring / rate))
    assert hours(recipe, 1)[1] == pytest.approx(8 * hours(recipe, 8)[1])


def test_a_cell_of_the_real_study_by_hand():
    recipe = RECIPES[1]
    found, (training, scoring) = cell_cost(recipe), hours(recipe, 1)
    assert found.training == pytest.approx(3600 * training * 256 / 20_000)
    assert found.scoring == pytest.approx(3600 * scoring * 2 * 456 / 20_000)
    # 24 groups of prompts, 48 tokens each, two bytes a weight.
    assert found.answers == pytest.approx(24 * 48 * 2 * 7_248_023_552 / 3.0e12)
    assert found.weights == pytest.approx(3 * 2 * 7_248_023_552 / 2e9)
    assert CELLS == 1 + 24 + 30 + 10


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.architecture)
def test_configuration_runs_at_tiny_size(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    model = tmp_path / "model"
    build_model(recipe.architecture).save_pretrained(model)
    # Vicuna's tokenizer has no chat template of its own.
    build_tokenizer(bos=recipe.architecture != "qwen2", chat=recipe.architecture != "llama").save_pretrained(model)
    rows = [safe_rlhf_row(f"how do i {word} ?", [f"first {word} .", f"never {word} ."], [i % 2 == 0, True], better=1)
            for i, word in enumerate(WORDS)]  # fmt: skip
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    main([
        f"--config=configs/{recipe.config}",
        f"--model.policy={model}",
        f"--data.train={data}",
        "--data.load.safe_rlhf.num_safe=4",
        "--data.load.safe_rlhf.num_unsafe=4",
        "--data.held_out_fraction=0.25",
        "--data.max_length=256",
        "--data.num_workers=0",
        "--data.batch_size=2",
        f"--model.scoring.cache_dir={tmp_path / 'cache'}",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.strategy=auto",
        "--trainer.enable_progress_bar=false",
        "--trainer.val_check_interval=1.0",
        f"--trainer.default_root_dir={tmp_path}",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
    ])  # fmt: skip
    assert "3 optimiser steps" in capsys.readouterr().out
    assert (
        type(AutoModelForCausalLM.from_pretrained(tmp_path / "version_0/model"))
        .__name__.lower()
        .startswith(recipe.architecture)
    )
    used = yaml.safe_load((tmp_path / "version_0/config.yaml").read_text())
    assert used["model"]["loss"]["class_path"] == "bdpo_pl.losses.BalancedDPOLoss"


def test_page_is_what_the_script_writes():
    assert PAGE.read_text(encoding="utf-8") == page()
