"""Models whose files hold quantised weights: refused by name where they would be trained."""

import json

import pytest
from makers import build_model, build_tokenizer
from training import fit

from bdpo_pl.errors import InputError
from bdpo_pl.models.loading import ModelSource, check_not_quantised, load_config

FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def quantised(folder, options):
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = options
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "options", [FOUR_BITS, {"quant_method": "gptq", "bits": 4}, {"quant_method": "mxfp4"}, {"quant_method": "fp8"}]
)
def test_a_quantised_policy_is_refused_by_name(tmp_path, options):
    source = ModelSource(str(quantised(tmp_path, options)))
    with pytest.raises(InputError, match=rf"quantised in its files \({options['quant_method']}\).*quantize=nf4"):
        check_not_quantised(load_config(source), source.name)


def test_a_run_refuses_a_quantised_policy(job, tmp_path):
    with pytest.raises(InputError, match="quantised in its files"):
        fit(job(policy=str(quantised(tmp_path / "model", FOUR_BITS)), trainer={"max_steps": 1}))


def test_weights_that_are_dequantised_on_loading_are_accepted(tmp_path):
    source = ModelSource(str(quantised(tmp_path, {"quant_method": "fp8", "dequantize": True})))
    check_not_quantised(load_config(source), source.name)
