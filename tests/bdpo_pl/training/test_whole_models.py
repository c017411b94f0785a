"""Models of which text is a part, and GGUF files: trained, and exported as plain folders that are whole."""

import json

import pytest
import torch
from architectures import VISION_PARTS, tiny
from makers import build_model, build_tokenizer
from training import fit
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from bdpo_pl.errors import InputError
from bdpo_pl.models.adapters import LoraOptions, is_adapter
from bdpo_pl.models.loading import ModelSource, load_model, load_tokenizer, model_fingerprint
from bdpo_pl.parallel.state import whole_state
from bdpo_pl.parallel.weight_files import WeightFiles
from bdpo_pl.training.export import export_model


@pytest.mark.parametrize(
    ("name", "lora"), [("Gemma 3 (vision)", None), ("Qwen3.5 (vision)", LoraOptions(r=4, alpha=8))], ids=["all", "lora"]
)
def test_a_model_of_images_and_text_trains_its_language_model_and_is_exported_whole(name, lora, job, tmp_path):
    source = tmp_path / "m"
    before = tiny(name)
    before.save_pretrained(source)
    build_tokenizer().save_pretrained(source)
    (source / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    module = fit(job(policy=str(source), lora=lora))
    assert type(module.policy) is type(before)
    trained = {key for key, p in module.policy.named_parameters() if p.requires_grad}
    assert trained
    assert not any(key.startswith(tuple(VISION_PARTS[name])) for key in trained)
    assert not any(is_adapter(key) for key, _ in module.policy.named_parameters() if "visual" in key)
    in_optimiser = sum(len(group["params"]) for group in module.trainer.optimizers[0].param_groups)
    assert in_optimiser == len(trained)

    state = whole_state(module.policy, True) if lora else None
    folder = export_model(module, build_tokenizer(), tmp_path / "exported", state, None)
    assert (folder / "preprocessor_config.json").read_text() == '{"image_mean": [0.5]}'
    after = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert after.keys() == before.state_dict().keys()
    changed = {key for key, value in before.state_dict().items() if not torch.equal(value, after[key])}
    assert changed
    assert not any(key.startswith(tuple(VISION_PARTS[name])) for key in changed)


def write_gguf(model, tokenizer, path):
    """A Qwen2 in llama.cpp's format, matrices in 8 bits."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(saved["model"]["vocab"], key=saved["model"]["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    control = {token["id"] for token in saved["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in control else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in saved["model"]["merges"]])
    writer.add_eos_token_id(4)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        array, kind = value.numpy(), key.rpartition(".")[2]
        name = f"{names.get_name(key.removesuffix(f'.{kind}'))}.{kind}"
        if array.ndim == 2:
            eight = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, eight), raw_dtype=eight)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_trained_and_exported_as_a_plain_folder(job, tmp_path):
    model, tokenizer = build_model(), build_tokenizer()
    file = write_gguf(model, tokenizer, tmp_path / "small.gguf")
    source = ModelSource(str(file))
    text = "how do i keep <|im_end|>"
    assert load_tokenizer(source)(text).input_ids == tokenizer(text).input_ids
    loaded = load_model(source, torch.float32).state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded[key], value, rtol=0, atol=2e-3)  # 8 bits
    assert not torch.equal(loaded["lm_head.weight"], model.state_dict()["lm_head.weight"])

    module = fit(job(policy=str(file)))
    folder = export_model(module, load_tokenizer(source), tmp_path / "exported", None, None)
    exported = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, exported[key]) for key, value in module.policy.state_dict().items())
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == tokenizer(text).input_ids


def test_faults_of_gguf_files_are_named(tmp_path):
    with pytest.raises(InputError, match="no GGUF file at"):
        load_tokenizer(ModelSource(str(tmp_path / "none.gguf")))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and nothing more")
    source = ModelSource(str(tmp_path / "bad.gguf"))
    with pytest.raises(InputError, match="cannot load a model from"):
        load_model(source, torch.float32)
    with pytest.raises(InputError, match="is a GGUF file, which cannot be read in parts"):
        WeightFiles.of(source)
    assert len(model_fingerprint(source)) == 64
