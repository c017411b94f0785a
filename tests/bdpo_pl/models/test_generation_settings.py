"""Settings of generation of a model that is built without its weights: those of the loaded one."""

import pytest
import torch
from makers import build_model

from bdpo_pl.errors import InputError
from bdpo_pl.models.checkpoint import plain_model
from bdpo_pl.models.loading import ModelSource, load_config, load_model, model_class

TWO_STOPS = {"eos_token_id": [2, 0], "temperature": 0.6, "top_p": 0.9, "do_sample": True}


@pytest.mark.parametrize("kept_in", ["file", "configuration", "neither"])
def test_a_model_built_without_weights_has_the_settings_of_the_loaded_one(tmp_path, kept_in):
    from transformers import GenerationConfig

    model = build_model()
    if kept_in == "file":
        model.generation_config = GenerationConfig(**TWO_STOPS)
    model.save_pretrained(tmp_path)
    if kept_in != "file":
        (tmp_path / "generation_config.json").unlink()
    if kept_in == "configuration":
        text = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(text.replace("{", '{"repetition_penalty": 1.3,', 1))
    source = ModelSource(str(tmp_path))
    loaded = load_model(source, torch.float32)
    with torch.device("meta"):
        built = model_class(source, load_config(source), torch.float32)
    exported = plain_model(source, torch.float32, loaded.state_dict(), None)
    for other in (built, exported):
        assert other.generation_config.to_dict() == loaded.generation_config.to_dict()
    if kept_in == "file":
        assert exported.generation_config.eos_token_id == [2, 0]
    if kept_in == "configuration":
        assert exported.generation_config.repetition_penalty == 1.3


def test_settings_that_cannot_be_read_are_refused(tmp_path):
    build_model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    source = ModelSource(str(tmp_path))
    with pytest.raises(InputError, match=r"generation_config.json is not valid JSON"):
        model_class(source, load_config(source), torch.float32)
