"""The exported folder."""

import pytest
import torch
from makers import build_model, build_tokenizer

from bdpo_pl.training.export import export_policy


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_folder_loads_as_any_other_and_says_the_same(tmp_path, architecture):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = build_model(architecture), build_tokenizer()
    model.config.use_cache = False
    folder = export_policy(model, tokenizer, tmp_path / "model")
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert not list(folder.glob("*.bin"))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.use_cache
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    again = AutoTokenizer.from_pretrained(folder)
    text = "how do i keep my garden safe ?"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template


def test_interrupted_export_leaves_no_folder_that_looks_whole(tmp_path, monkeypatch):
    tokenizer = build_tokenizer()

    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export_policy(build_model(), tokenizer, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    monkeypatch.undo()
    assert export_policy(build_model(), tokenizer, tmp_path / "model").is_dir()
