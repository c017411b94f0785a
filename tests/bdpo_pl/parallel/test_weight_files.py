"""Parts of weights, read from files that may be anyone's."""

import json

import pytest
import torch
from architectures import tiny
from makers import build_model, large
from safetensors.torch import load_file, save_file

from bdpo_pl.errors import InputError
from bdpo_pl.models.loading import ModelSource
from bdpo_pl.parallel.weight_files import WeightFiles


def test_a_part_is_read_from_one_file_or_several(tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "several", max_shard_size="40KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    name, part = "model.layers.1.mlp.up_proj.weight", (slice(3, 9), slice(0, 32))
    expected = model.state_dict()[name][part]
    for folder in ("one", "several"):
        with WeightFiles.of(ModelSource(str(tmp_path / folder))) as files:
            assert torch.equal(files.read(["unknown", name], (64, 32), part), expected)


def test_faults_are_named(tmp_path):
    with pytest.raises(InputError, match=r"has neither model\.safetensors nor"):
        WeightFiles(tmp_path, "empty")
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path, "m")
    with pytest.raises(InputError, match="lack the weight b"):
        files.read(["b"], (2, 3), (slice(0, 1), slice(0, 3)))
    with pytest.raises(InputError, match=r"a has shape \(2, 3\) in model\.safetensors, and \(4, 3\)"):
        files.read(["a"], (4, 3), (slice(0, 1), slice(0, 3)))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        WeightFiles(tmp_path, "m")


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/passwd", "sub/file.safetensors"])
def test_an_index_cannot_name_files_outside_its_folder(tmp_path, outside):
    save_file({"a": torch.zeros(2)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": outside}}))
    with pytest.raises(InputError, match="not the name of a file in the folder"):
        WeightFiles(folder, "m")
    assert load_file(tmp_path / "secret.safetensors")


@pytest.mark.parametrize(
    "name", ["Gemma 3 (vision)", "Mistral 3 (vision)", "Qwen3-VL", "Mixtral", "Qwen3-MoE", "gpt-oss"]
)
def test_weights_that_transformers_renames_or_joins_are_found(tmp_path, name):
    model = large(tiny(name))
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = tiny(name)
    tied = set(model.all_tied_weights_keys)
    with WeightFiles.of(ModelSource(str(tmp_path))) as files:
        files.take_names_of(empty)
        for key, value in model.state_dict().items():
            if key not in tied:
                part = (slice(0, 1), *(slice(0, size) for size in value.shape[1:]))
                read = files.read([key], tuple(value.shape), part if value.shape else ())
                assert torch.equal(read, value[part] if value.shape else value), key
