"""A model's folder, which may be anyone's: what is missing is named, nothing leads out, every file is counted."""

import json
import os
import socket

import pytest
import torch
from makers import build_model, build_tokenizer
from training import fit

from bdpo_pl.errors import InputError
from bdpo_pl.models import loading
from bdpo_pl.models.loading import ModelSource, check_vocabulary, load_config, load_model, load_tokenizer
from bdpo_pl.models.loading import model_fingerprint as fingerprint


@pytest.fixture
def folder(tmp_path):
    """A model's folder of its own, to be changed."""
    build_model().save_pretrained(tmp_path / "m")
    build_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_a_missing_tokenizer_is_the_models_fault(folder):
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match=r"(has no tokenizer.*|cannot load a tokenizer.*)"):
        load_tokenizer(ModelSource(str(folder)))
    (folder / "config.json").write_text(
        json.dumps({**json.loads((folder / "config.json").read_text()), "model_type": "gpt2"})
    )
    with pytest.raises(InputError, match="transformers would make an empty one that cannot read text"):
        load_tokenizer(ModelSource(str(folder)))


def test_too_little_memory_is_no_fault_of_the_model(folder, monkeypatch):
    class Large:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 800000000 bytes")

    monkeypatch.setattr(loading, "auto_class", lambda config: Large)
    with pytest.raises(RuntimeError, match=r"^DefaultCPUAllocator: can"):
        load_model(ModelSource(str(folder)), torch.float32)


def test_a_peft_adapter_is_named_as_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    for load in (load_tokenizer, load_config, fingerprint):
        with pytest.raises(InputError, match=r"is a PEFT adapter of org/base, not a whole model; merge it"):
            load(ModelSource(str(tmp_path)))


def test_ids_beyond_the_embedding_matter_only_if_the_data_hold_them():
    config = build_model().config
    check_vocabulary(config, [399], "M")
    with pytest.raises(InputError, match="the data hold token 400, but M embeds only 400 tokens"):
        check_vocabulary(config, [3, 400], "M")


def test_a_tokenizer_that_knows_more_than_the_model_embeds_trains_it(job, folder):
    """As Gemma 3's, whose image token has no row in the embedding."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<image_soft_token>") == 380
    tokenizer.save_pretrained(folder)
    build_model(vocab_size=380).save_pretrained(folder)
    assert fit(job(policy=str(folder), trainer={"max_steps": 1})).evaluations


@pytest.mark.parametrize("name", ["chat_template.jinja", "merges.txt", "tokenizer.model", "generation_config.json"])
def test_every_file_that_changes_what_a_model_says_is_in_its_fingerprint(folder, name):
    source = ModelSource(str(folder))
    (folder / name).write_text("{}")
    before = fingerprint(source)
    (folder / "README.md").write_text("for people")
    assert fingerprint(source) == before
    (folder / name).write_text("{ }")
    assert fingerprint(source) != before


def sharded(folder):
    (folder / "model.safetensors").unlink()
    build_model().save_pretrained(folder, max_shard_size="40KB")
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("load", [load_model, fingerprint], ids=["loading", "fingerprint"])
def test_an_index_cannot_lead_out_of_the_folder(folder, load):
    index = sharded(folder)
    saved = json.loads(index.read_text())
    name = next(iter(saved["weight_map"]))
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes((folder / saved["weight_map"][name]).read_bytes())
    saved["weight_map"][name] = "../outside.safetensors"
    index.write_text(json.dumps(saved))
    with pytest.raises(InputError, match=r"'\.\./outside\.safetensors' is not the name of a file in the folder"):
        load(ModelSource(str(folder)), *([torch.float32] if load is load_model else []))


def test_a_link_cannot_lead_out_of_the_folder(folder):
    outside = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(InputError, match=r"model\.safetensors leads out of the model's folder, to .*outside"):
        load_model(ModelSource(str(folder)), torch.float32)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "nothing")
    with pytest.raises(InputError, match="is a link to nothing"):
        load_config(ModelSource(str(folder)))


def test_links_of_the_hubs_cache_are_followed(folder):
    """As `snapshot_download` leaves them."""
    repository = folder.parent / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(folder.iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert load_model(ModelSource(str(snapshot)), torch.float32).num_parameters() > 0


@pytest.mark.parametrize("kind", ["fifo", "socket"])
def test_what_is_no_file_is_not_waited_for(folder, kind, monkeypatch):
    (folder / "model.safetensors").unlink()
    if kind == "fifo":
        os.mkfifo(folder / "model.safetensors")
    else:
        monkeypatch.chdir(folder)  # a socket's path has a hundred characters at most
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("model.safetensors")
    with pytest.raises(InputError, match="is not a regular file"):
        fingerprint(ModelSource(str(folder)))


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(folder, text):
    sharded(folder).write_text(text)
    with pytest.raises(InputError, match=r"index\.json: not an index of weights"):
        load_model(ModelSource(str(folder)), torch.float32)
