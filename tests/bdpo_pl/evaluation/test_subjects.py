"""Which model a name stands for, and that a checkpoint's weights are those that its run exported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from makers import build_model, build_tokenizer, preference_rows, write_jsonl

from bdpo_pl import embedded, fit
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.answerers import GenerationOptions
from bdpo_pl.evaluation.runner import check_labels
from bdpo_pl.evaluation.subjects import newest_run, subject
from bdpo_pl.forward.generation import generate_responses, stop_ids
from bdpo_pl.models import precision
from bdpo_pl.models.adapter_folder import adapter_digest
from bdpo_pl.models.folder import text_digest
from bdpo_pl.models.loading import ModelSource, model_fingerprint
from bdpo_pl.models.precision import choose_device, choose_devices, choose_dtype

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of `fit` on one model, without adapters and with: folder of each."""
    root = tmp_path_factory.mktemp("runs")
    model = build_model()
    # Known to no class and no tokenizer: it comes with the folder alone.
    model.generation_config.eos_token_id = [4, 77]
    model.save_pretrained(root / "base")
    build_tokenizer().save_pretrained(root / "base")
    pairs = write_jsonl(root / "pairs.jsonl", preference_rows(16))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("BDPO_PL_CACHE", str(root / "cache"))
        for options in ([], ["--model.lora.r=4"]):
            fit.main([
                f"--model.policy={root / 'base'}", f"--data.train={pairs}", "--data.held_out_fraction=0.25",
                "--model.optimizer=torch.optim.AdamW", "--model.optimizer.init_args.lr=2e-2",
                "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", *options,
            ])  # fmt: skip
    return {"whole": root / "runs" / "version_0", "lora": root / "runs" / "version_1"}


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_checkpoint_is_the_model_that_its_run_exported(runs, kind):
    path = runs[kind] / "checkpoints" / "last.ckpt"
    model, tokenizer = subject(str(path)).load(torch.float32, CPU)
    exported, _ = subject(str(runs[kind] / "model")).load(torch.float32, CPU)
    base, _ = subject(str(runs[kind].parents[1] / "base")).load(torch.float32, CPU)
    weights, expected = dict(model.named_parameters()), dict(exported.named_parameters())
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=0 if kind == "whole" else 1e-6)
    assert any(not torch.equal(value, expected[name]) for name, value in base.named_parameters())
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    prompts = ["how do i keep my garden safe ?", "slugs ?"]
    answers = generate_responses(model, tokenizer, prompts, max_new_tokens=8)
    assert answers == generate_responses(exported, tokenizer, prompts, max_new_tokens=8)
    assert stop_ids(model, tokenizer) == stop_ids(exported, tokenizer) == {4, 77}


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_checkpoint_in_half_precision_keeps_what_transformers_keeps_whole(runs, kind):
    model, _ = subject(str(runs[kind] / "checkpoints" / "last.ckpt")).load(torch.bfloat16, CPU)
    exported, _ = subject(str(runs[kind] / "model")).load(torch.bfloat16, CPU)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ours, theirs = dict(model.named_buffers()), dict(exported.named_buffers())
    assert {name: b.dtype for name, b in ours.items()} == {name: b.dtype for name, b in theirs.items()}
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_checkpoints_are_told_apart(runs):
    path = runs["whole"] / "checkpoints" / "last.ckpt"
    best = next((runs["whole"] / "checkpoints").glob("best-step=*.ckpt"))
    prints = {subject(str(p)).fingerprint() for p in (path, best, runs["whole"] / "model", runs["lora"] / "model")}
    assert len(prints) == 4
    assert subject(str(path)).fingerprint() == subject(f"other={path}").fingerprint()
    own = ModelSource(str(runs["whole"] / "model"))
    assert subject(own.name).fingerprint() == model_fingerprint(own)


def test_checkpoint_of_fit_is_found_by_its_own_name(runs, monkeypatch):
    best = next((runs["whole"] / "checkpoints").glob("best-step=*.ckpt"))
    found = subject(str(best))
    assert (found.label, found.checkpoint) == (f"version_0/{best.stem}", best)
    assert subject(f"after={best}").label == "after"
    monkeypatch.chdir(best.parent)
    assert subject(best.name).checkpoint == Path(best.name)


@pytest.mark.parametrize(
    ("text", "label", "name", "revision"),
    [
        ("Qwen/Qwen2-0.5B", "Qwen/Qwen2-0.5B", "Qwen/Qwen2-0.5B", None),
        ("Qwen/Qwen2-0.5B@v1", "Qwen/Qwen2-0.5B", "Qwen/Qwen2-0.5B", "v1"),
        ("before=Qwen/Qwen2-0.5B@v1", "before", "Qwen/Qwen2-0.5B", "v1"),
        ("runs/version_3/model", "version_3", "runs/version_3/model", None),
        ("runs/version_3/model-2", "version_3/model-2", "runs/version_3/model-2", None),
        ("/models/mine/", "mine", "/models/mine/", None),
        ("/models/a=b", "a=b", "/models/a=b", None),
        ("x=/models/a=b", "x", "/models/a=b", None),
        ("embedded", "embedded", str(embedded.MODEL_DIR), None),
        ("the one before=embedded", "the one before", str(embedded.MODEL_DIR), None),
    ],
)
def test_names(text, label, name, revision):
    found = subject(text)
    assert (found.label, found.source.name, found.source.revision) == (label, name, revision)
    assert found.checkpoint is None


def test_folder_with_an_at_sign_is_a_folder(tmp_path):
    (tmp_path / "a@b").mkdir()
    assert subject(str(tmp_path / "a@b")).source.name == str(tmp_path / "a@b")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("=embedded", "names no model"),
        ("before=", "names no model"),
        ("", "names no model"),
        ("nowhere.ckpt", r"no checkpoint at nowhere\.ckpt"),
    ],
)
def test_names_of_nothing(text, fault):
    with pytest.raises(InputError, match=fault):
        subject(text)


def test_bad_checkpoints(tmp_path, runs):
    path = tmp_path / "bad.ckpt"
    path.write_bytes((runs["whole"] / "checkpoints" / "last.ckpt").read_bytes()[:1000])
    with pytest.raises(InputError, match=r"bad\.ckpt is not a whole checkpoint"):
        subject(str(path))
    torch.save({"state_dict": {}}, path)
    with pytest.raises(InputError, match=r"bad\.ckpt was not written by bdpo_pl\.fit"):
        subject(str(path))
    saved = torch.load(runs["whole"] / "checkpoints" / "last.ckpt", weights_only=True)
    del saved["state_dict"]["policy.model.norm.weight"]
    torch.save(saved, path)
    with pytest.raises(InputError, match=r"does not hold the weights of .*model\.norm\.weight"):
        subject(str(path)).load(torch.float32, CPU)


@pytest.fixture
def moved(runs, tmp_path):
    """Function that copies a run's last checkpoint, with changes, and its model; it returns both paths."""

    def copy(kind, change=lambda saved: None):
        path = runs[kind] / "checkpoints" / "last.ckpt"
        saved = torch.load(path, weights_only=True)
        shutil.copytree(saved["bdpo_pl"]["policy"], tmp_path / "base")
        saved["bdpo_pl"]["policy"] = str(tmp_path / "base")
        change(saved)
        torch.save(saved, tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt", tmp_path / "base"

    return copy


def halve_weights(base):
    model = build_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    model.save_pretrained(base)


def test_adapters_are_not_merged_into_another_model(moved):
    path, base = moved("lora")
    subject(str(path)).load(torch.float32, CPU)
    halve_weights(base)
    for ask in (lambda one: one.load(torch.float32, CPU), lambda one: one.fingerprint()):
        with pytest.raises(InputError, match=r"last\.ckpt holds adapters of .*/base \(sha256 .* is something else"):
            ask(subject(str(path)))


def test_checkpoint_with_all_weights_needs_only_a_model_like_its_own(moved):
    path, base = moved("whole")
    expected, _ = subject(str(path)).load(torch.float32, CPU)
    halve_weights(base)
    found, _ = subject(str(path)).load(torch.float32, CPU)
    weights = dict(expected.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in found.named_parameters())


def test_adapters_that_began_with_an_adapter(moved, tmp_path):
    def change(saved):
        saved["bdpo_pl"]["lora"]["adapter"] = str(tmp_path)
        policy = saved["bdpo_pl_run"]["traits"]["policy"]
        policy["value"] = text_digest(f"{policy['value']} {adapter_digest(str(tmp_path))}")

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text(name)
    path, base = moved("lora", change)
    subject(str(path)).fingerprint()
    halve_weights(base)
    with pytest.raises(InputError, match="or the adapter in"):
        subject(str(path)).fingerprint()
    # Its files may be gone: then nothing can be compared.
    (tmp_path / "adapter_config.json").unlink()
    subject(str(path)).fingerprint()


@pytest.mark.parametrize("what", ["chat template", "tokenizer"])
def test_checkpoint_is_asked_as_its_run_was_trained_or_not_at_all(moved, what):
    def change(saved):
        trait = {"chat template": "template", "tokenizer": "tokenizer"}[what]
        saved["bdpo_pl_run"]["traits"][trait] = {"value": "other", "shown": "mine.jinja"}

    path, _ = moved("whole", change)
    options = GenerationOptions()
    for ask in (
        lambda one: one.load(torch.float32, CPU),
        lambda one: one.answerer(torch.float32, one.never, options),
    ):
        with pytest.raises(InputError, match=rf"of a run with another {what} than .*mine\.jinja.*its exported model"):
            ask(subject(str(path)))


def test_checkpoints_that_do_not_tell_their_run_are_taken_as_they_are(moved):
    path, base = moved("lora", lambda saved: saved.pop("bdpo_pl_run"))
    halve_weights(base)
    subject(str(path)).load(torch.float32, CPU)


def test_run_without_a_template_keeps_that_of_its_tokenizer(moved):
    def change(saved):
        saved["bdpo_pl_run"]["traits"]["template"] = {"value": None, "shown": "none"}

    path, _ = moved("whole", change)
    assert subject(str(path)).tokenizer.chat_template


def test_model_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no model folder at"):
        subject(f"{tmp_path}/nowhere").fingerprint()


def test_newest_run_is_one_of_the_embedded_model(tmp_path):
    for version, policy in ((0, "embedded"), (1, "embedded"), (2, "Qwen/Qwen2-0.5B")):
        folder = tmp_path / f"version_{version}" / "model"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({}))
        (folder.parent / "config.yaml").write_text(yaml.safe_dump({"model": {"policy": policy}}))
    (tmp_path / "version_3" / "model").mkdir(parents=True)
    assert newest_run(tmp_path) == tmp_path / "version_1" / "model"
    (tmp_path / "version_1" / "config.yaml").write_text("model: [")
    assert newest_run(tmp_path) == tmp_path / "version_0" / "model"
    assert newest_run(tmp_path / "nowhere") is None


def test_two_models_of_one_label():
    with pytest.raises(InputError, match="models: a names several; give each a label"):
        check_labels([subject("a=x/y"), subject("b=x/z"), subject("a=x/y")])


def test_device_and_dtype():
    assert choose_device("cpu") == CPU
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(InputError, match="dtype must be auto, float32, bfloat16 or float16, not 'int8'"):
        choose_dtype("int8", CPU)
    with pytest.raises(InputError, match="device 'nosuch' is not available here"):
        choose_device("nosuch")


def test_devices_by_number(monkeypatch):
    assert choose_devices("cpu", 1) == choose_devices("cpu", "auto") == [CPU]
    assert choose_devices("cpu", 3) == [CPU] * 3
    monkeypatch.setattr(precision, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_devices("cuda", 1) == [torch.device("cuda")]
    assert choose_devices("cuda", "auto") == choose_devices("cuda", 2) == [torch.device("cuda", i) for i in range(2)]
    assert choose_devices("cuda:1", 1) == [torch.device("cuda:1")]
    for name, count, said in (
        ("cpu", 1024, "devices is 1024, and on a CPU each is a process with the whole model; set it to at most"),
        ("cuda", 3, "devices is 3, and the cuda devices of this machine are 2; lower it"),
        ("cuda:1", "auto", "device cuda:1 is a single one, and devices is auto; leave one of the two out"),
        ("mps", 2, "devices is 2, and the mps devices of this machine are 1"),
    ):
        with pytest.raises(InputError, match=said):
            choose_devices(name, count)


def test_records_that_hold_special_thoughts_in_answers_are_not_taken_up(tmp_path):
    build_model().save_pretrained(tmp_path)
    facts = []
    for special in (False, True):
        tokenizer = build_tokenizer()
        tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
        tokenizer.save_pretrained(tmp_path)
        one = subject(str(tmp_path))
        facts.append(one.answerer(torch.float32, one.never, GenerationOptions()).facts.keys())
    assert facts[1] - facts[0] == {"thoughts"}


def test_servers_of_one_model():
    both = subject("m=http://a:1/v1,http://b:2/v1#name")
    assert (both.label, both.url, both.model) == ("m", "http://a:1/v1,http://b:2/v1", "name")
    one = subject("m=http://a:1/v1#name")
    options = GenerationOptions()
    found = both.answerer(torch.float32, both.never, options), one.answerer(torch.float32, one.never, options)
    # A server more or less asks nothing anew.
    assert found[0].facts == found[1].facts
    assert found[0].batch == 2 * found[1].batch
    with pytest.raises(InputError, match="names the model twice; write http://a/v1,http://b/v1#NAME"):
        subject("m=http://a:1/v1#name,http://b:2/v1#name")
