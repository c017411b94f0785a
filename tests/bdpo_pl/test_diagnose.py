"""The command that looks at a preference set before training, from its options to its three files."""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser
from children import command_in_ranks
from makers import build_model, build_tokenizer, preference_rows, write_jsonl

import bdpo_pl.scoring.scoring_pass
from bdpo_pl import fit
from bdpo_pl.data.loading import load_pairs
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.diagnose import main
from bdpo_pl.losses.balanced_dpo import balance_weights
from bdpo_pl.scoring.scores import ScoreTable

CONFIGS = Path(__file__).parents[2] / "configs"
EVIL = "<script>document.title='taken'</script><img src=http://127.0.0.1:8/x.png>"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BDPO_PL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rows():
    return [{**row, "category": ["fraud", EVIL][i % 2]} for i, row in enumerate(preference_rows(40))]


@pytest.fixture
def base(model_dir, tmp_path, rows):
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    return [f"--model.policy={model_dir}", f"--data.train={path}", "--data.held_out_fraction=0.2",
            "--trainer.accelerator=cpu", "--model.loss.tau=0.25"]  # fmt: skip


def results(folder="runs/diagnosis"):
    with open(f"{folder}/pairs.jsonl", encoding="utf-8") as lines:
        pairs = [json.loads(line) for line in lines]
    with open(f"{folder}/diagnosis.json", encoding="utf-8") as file:
        return json.load(file), pairs


def logp_alone(model, context, response):
    with torch.no_grad():
        logp = model(torch.tensor([context + response])).logits.double().log_softmax(-1)[0]
    at = torch.arange(len(context) - 1, len(context) + len(response) - 1)
    return logp[at, torch.tensor(response)].sum().item()


def refuse_to_score(*_, **__):
    raise AssertionError("a pair is scored anew")


def test_numbers_are_those_of_the_model_alone(base, tmp_path, capsys):
    main(base)
    printed = capsys.readouterr().out
    for part in (
        "training",
        "held-out",
        "spread",
        "in use",
        "auto",
        "Findings",
        "re-weighted strongly",
        "report.html",
    ):
        assert part in printed
    report, pairs = results()
    table, _ = load_pairs("all", str(tmp_path / "pairs.jsonl"), PairTokenizer(build_tokenizer()), Truncation(512))
    model = build_model().eval()
    assert {line["place"] for line in pairs} == set(table.places)
    for line in pairs[::6]:
        pair = table[table.places.index(line["place"])]
        c = [
            (logp_alone(model, pair.prompt_ids, y) - logp_alone(model, table.null_prompt_ids, y)) / len(y)
            for y in (pair.chosen_ids, pair.rejected_ids)
        ]
        weights = balance_weights(*torch.tensor(c), 0.25)
        assert [line["comprehension_chosen"], line["comprehension_rejected"]] == pytest.approx(c, abs=1e-4)
        assert [line["weight_chosen"], line["weight_rejected"]] == pytest.approx([w.item() for w in weights], abs=1e-4)
    for name, size in (("train", 32), ("held_out", 8)):
        imbalance = [line["imbalance"] for line in pairs if line["split"] == name]
        overall = report["splits"][name]["overall"]
        assert overall["pairs"] == len(imbalance) == size
        assert overall["imbalance"]["value"] == pytest.approx(np.mean(imbalance), abs=1e-6)
    assert report["splits"]["train"]["highest"][0]["imbalance"] == max(
        line["imbalance"] for line in pairs if line["split"] == "train"
    )


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--trainer.precision=bf16-mixed", "--model.scoring.chunk_pairs=7", "--data.max_length=128"],
        ["--model.loss=BalancedDPOLoss", "--model.loss.estimator=hsic", "--model.reference_dtype=bfloat16"],
    ],
)
def test_fit_that_follows_scores_nothing_anew(base, tmp_path, monkeypatch, options):
    main([*base, *options])
    scored = sorted((tmp_path / "cache").rglob("*"))
    assert any(path.suffix == ".safetensors" for path in scored)
    monkeypatch.setattr(bdpo_pl.scoring.scoring_pass, "score_pairs", refuse_to_score)
    small = ["--trainer.max_steps=1", "--trainer.enable_progress_bar=false", "--export=false"]
    fit.main([*base, *options, *small])
    assert sorted((tmp_path / "cache").rglob("*")) == scored
    with pytest.raises(AssertionError, match="scored anew"):
        main([*base, *options, "--model.dtype=float16", "--model.reference_dtype=float16"])


def test_two_processes_share_the_work_and_give_the_cache_of_one(base, tmp_path):
    main([*base, "--model.scoring.chunk_pairs=8"])
    alone, _ = results()
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp", "--model.scoring.chunk_pairs=8"]
    cache = str(tmp_path / "cache of two")
    runs = command_in_ranks("bdpo_pl.diagnose", [*base, *ranks, "--diagnose.folder=two"], BDPO_PL_CACHE=cache)
    assert [run.returncode for run in runs] == [0, 0], runs
    assert [run.stdout.count("Findings") for run in runs] == [1, 0]
    assert results("two")[0]["splits"] == alone["splits"]
    one, two = tmp_path / "cache", tmp_path / "cache of two"
    chunks = {path.relative_to(one): path.read_bytes() for path in one.rglob("*.safetensors")}
    assert chunks
    assert chunks == {path.relative_to(two): path.read_bytes() for path in two.rglob("*.safetensors")}


def test_texts_are_in_no_file_and_on_no_screen_unless_asked_for(base, rows, tmp_path, capsys):
    secret = "zebra <b>17</b>"
    path = write_jsonl(
        tmp_path / "pairs.jsonl",
        [{**row, **{k: f"{secret} {row[k]}" for k in ("prompt", "chosen", "rejected")}} for row in rows],
    )
    main(base)
    files = list((tmp_path / "runs" / "diagnosis").iterdir())
    assert {file.name for file in files} == {"report.html", "diagnosis.json", "pairs.jsonl"}
    everything = "".join(file.read_text(encoding="utf-8") for file in files) + capsys.readouterr().out
    assert str(path) in everything
    for word in ("zebra", "garden", "poison"):
        assert word not in everything
    assert "may be harmful or private" not in everything
    main([*base, "--diagnose.show_texts=true"])
    report, pairs = results()
    assert "may be harmful or private" in report["warning"]
    assert all(secret in line["texts"]["chosen"] for line in report["splits"]["train"]["highest"])
    assert "texts" not in pairs[0]
    html = (tmp_path / "runs" / "diagnosis" / "report.html").read_text(encoding="utf-8")
    assert "may be harmful or private" in html
    assert "zebra &lt;b&gt;17&lt;/b&gt;" in html
    assert "zebra" not in capsys.readouterr().out


def test_report_in_a_browser(base, tmp_path):
    main([*base, "--diagnose.show_texts=true"])
    with Browser(tmp_path / "profile") as browser:
        for options in ({}, {"dark": True, "width": 380}, {"paper": True, "width": 700}):
            visit = browser.visit("runs/diagnosis/report.html", **options)
            assert visit.title == "Diagnosis before training"
            assert (visit.complaints, visit.requests, visit.overflow, visit.nameless) == ([], [], 0, 0)
            assert len(visit.drawings) == 6
            assert all(width > 200 and height > 60 for width, height in visit.drawings)
    for part in ("of the training pairs re-weighted strongly", "Imbalance by category", "<script>", "fraud"):
        assert part in visit.text


def test_no_option_looks_at_the_embedded_set(monkeypatch, capsys):
    def quick(model, table, indices, **_):
        assert model.config.vocab_size > 500
        scores = np.random.default_rng(len(table)).normal(-30.0, 3.0, (2, 2, len(indices))).astype(np.float32)
        return ScoreTable(scores[0], scores[1])

    monkeypatch.setattr(bdpo_pl.scoring.scoring_pass, "score_pairs", quick)
    main([])
    report, pairs = results()
    assert [report["splits"][name]["overall"]["pairs"] for name in ("train", "held_out")] == [1200, 240]
    assert len(pairs) == 1440
    assert len(report["splits"]["train"]["categories"]) > 20
    assert not report["leaks"]["prompts"]
    assert "1,200" in capsys.readouterr().out


def test_configuration_of_fit_serves(base):
    main([f"--config={CONFIGS / 'own_data.yaml'}", *base])
    fit.main([*base, "--trainer.max_steps=1", "--trainer.enable_progress_bar=false", "--export=false"])
    main(["--config=runs/version_0/config.yaml", "--diagnose.folder=again"])
    assert results("again")[0] == results()[0]


def test_help_names_its_options_and_those_of_fit(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--diagnose.strong_ratio", "--diagnose.show_texts", "--model.policy", "--data.train", "--config"):
        assert option in printed


def test_faults_of_the_data_are_found(base, rows, tmp_path, capsys):
    first, second = rows[0], rows[1]
    swapped = {**first, "chosen": first["rejected"], "rejected": first["chosen"]}
    write_jsonl(tmp_path / "pairs.jsonl", [*rows, swapped, second])
    held = write_jsonl(tmp_path / "held.jsonl", [rows[5], {**rows[6], "prompt": rows[6]["prompt"].upper() + " !"},
                                                {**rows[7], "prompt": "something new"}])  # fmt: skip
    main([*(o for o in base if "fraction" not in o), f"--data.held_out={held}"])
    report, _ = results()
    train, leaks = report["splits"]["train"], report["leaks"]
    pairs = f"{tmp_path / 'pairs.jsonl'}, line"
    assert train["swapped"] == [
        {"place": f"{pairs} 1", "other": f"{pairs} 41"},
        {"place": f"{pairs} 41", "other": f"{pairs} 1"},
    ]
    assert (train["duplicates"], train["duplicates_dropped"]) == ([f"{pairs} 42"], True)
    assert leaks["prompts"] == [{"place": f"{held}, line 1", "other": f"{pairs} 6"}]
    assert leaks["near_prompts"] == [{"place": f"{held}, line 2", "other": f"{pairs} 7"}]
    assert leaks["chosen"] == 3
    printed = " ".join(re.sub(r"[│\s]+", " ", capsys.readouterr().out).split())
    assert "2 pairs contradict another" in printed
    assert "1 pair held out from training share a prompt" in printed


def test_nothing_held_out_and_no_categories(base, tmp_path, capsys):
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(12))
    main([*base, "--data.held_out_fraction=0"])
    report, _ = results()
    assert report["leaks"] is None
    assert report["splits"].keys() == {"train"}
    assert report["splits"]["train"]["categories"] == []
    assert "Nothing is held out" in capsys.readouterr().out


def test_set_with_one_pair(base, tmp_path, capsys):
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(1))
    with pytest.raises(SystemExit) as stopped:
        main(base)
    assert stopped.value.code == 2
    assert "data.held_out_fraction to 0" in " ".join(capsys.readouterr().err.split())
    main([*base, "--data.held_out_fraction=0"])
    report, pairs = results()
    assert len(pairs) == 1
    assert report["splits"]["train"]["length_bias"]["correlation_chosen"] is None
    assert "NaN" not in json.dumps(report)
    assert "only 1 pair" in capsys.readouterr().out


def test_model_without_a_chat_template_is_read_plainly_and_says_so(base, tmp_path, capsys):
    folder = tmp_path / "plain"
    build_model().save_pretrained(folder)
    build_tokenizer(chat=False, bos=True).save_pretrained(folder)
    base[0] = f"--model.policy={folder}"
    main([*base, "--data.held_out_fraction=0.204"])
    report, _ = results()
    assert report["facts"]["held-out pairs"] == "20.4% of the training set, by prompt"
    assert report["facts"]["chat template"] == "none"
    assert "'<s>'" in report["facts"]["comprehension"]
    assert "No chat template: the tokenizer has none" in " ".join(report["notes"])
    assert "No chat template" in capsys.readouterr().out
    messages = [{"prompt": [{"role": "user", "content": "a ?"}], "chosen": [{"role": "assistant", "content": "b"}],
                 "rejected": [{"role": "assistant", "content": "c"}]}]  # fmt: skip
    write_jsonl(tmp_path / "pairs.jsonl", messages)
    with pytest.raises(SystemExit):
        main(base)
    assert "no chat template" in " ".join(capsys.readouterr().err.split())


def test_loss_without_weights_is_told_those_of_balanced_dpo(base):
    main([*base[:-1], "--model.loss=DPOLoss", "--model.reference_mode=live"])  # without τ, which DPO does not have
    report, pairs = results()
    assert report["weights_of"].startswith("BalancedDPOLoss")
    assert len({line["weight_chosen"] for line in pairs}) > 10


def test_sum_of_losses_without_weights_and_duplicates_of_every_source_are_told(base, tmp_path, rows):
    parts = {"a": [*rows[:6], rows[2]], "b": rows[5:12], "c": rows[12:20]}
    sources = [write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in parts.items()]
    base[1] = f"--data.train=[{', '.join(f'{{source: {path}}}' for path in sources)}]"
    losses = "[{class_path: RMiPOLoss}, {class_path: SFTLoss}]"
    main([*base[:-1], "--model.loss=WeightedSum", f"--model.loss.losses={losses}"])
    report, _ = results()
    assert report["weights_of"].startswith("BalancedDPOLoss")
    split = report["splits"]["train"]
    assert split["duplicates"] == [f"{sources[0]}, line 7", f"{sources[1]}, line 1"]
    assert split["duplicates_dropped"]


def test_weights_by_ratio_have_no_threshold_of_the_imbalance(base):
    main([*base, "--model.loss=BalancedDPOLoss", "--model.loss.max_weight_ratio=1.2"])
    report, _ = results()
    assert (report["strong_imbalance"], report["splits"]["train"]["overall"]["strong"]) == (None, 0)
    assert max(row["largest"] for row in report["temperatures"]) <= 1.2
    main([*base, "--model.loss=BalancedDPOLoss", "--model.loss.estimator=ifd", "--model.loss.weighting=ratio"])
    report, pairs = results()
    assert (report["strong_imbalance"], report["unit"], report["weights_of"]) == (None, "", None)
    page = Path("runs/diagnosis/report.html").read_text(encoding="utf-8")
    assert "ratio of losses, null prompt over prompt" in page
    assert "mutual information" not in page
    assert "outer lines" not in page
    for line in pairs:
        share = line["comprehension_rejected"] / (line["comprehension_chosen"] + line["comprehension_rejected"])
        assert line["weight_chosen"] == pytest.approx(share, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--model.policy=/nowhere/at/all"], "no model folder at '/nowhere/at/all'"),
        (["--data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["--data.held_out=nowhere.jsonl", "--data.held_out_fraction=0"], "nowhere.jsonl"),
        (["--diagnose.strong_ratio=1"], "strong_ratio must be above 1"),
        (["--diagnose.extremes=-1"], "diagnose.extremes"),
        (["--diagnose.show_txts=true"], "show_txts"),
        (["--model.scoring.comprehension=false", "--model.loss=DPOLoss"], "DPOLoss has no option tau"),
        (["--model.scoring.comprehension=false"], "scoring.comprehension is false"),
        (["--diagnose.folder=pairs.jsonl"], "diagnose.folder"),
        (["--trainer.devices=0"], "devices"),
    ],
)
def test_faults_end_with_status_2_and_their_name(base, capsys, options, fault):
    with pytest.raises(SystemExit) as stopped:
        main([*base, *options])
    assert stopped.value.code == 2
    assert fault in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "a ?", "chosen": "b ."}, "'rejected'"),
        ({"prompt": "a ?", "chosen": "b .", "rejected": ""}, "line 1"),
        ({"prompt": "a ?", "chosen": "b .", "rejected": "b ."}, "line 1"),
    ],
)
def test_bad_rows_are_named(base, tmp_path, capsys, row, fault):
    write_jsonl(tmp_path / "pairs.jsonl", [row])
    with pytest.raises(SystemExit) as stopped:
        main(base)
    assert stopped.value.code == 2
    assert fault in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_ends_it_with_its_own_status_and_what_was_scored_stays(
    base, tmp_path, monkeypatch, capsys, number, status
):
    calls, score = [], bdpo_pl.scoring.scoring_pass.score_pairs

    def signalled(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return score(*args, **kwargs)

    monkeypatch.setattr(bdpo_pl.scoring.scoring_pass, "score_pairs", signalled)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        main(base)
    assert stopped.value.code == status
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    said = " ".join(capsys.readouterr().err.split())
    assert f"stopped by {number.name}; the scores so far are cached; the same command continues from there" in said
    assert not Path("runs/diagnosis/report.html").exists()
    calls.append(None)  # so that the next one is the third
    before = len(calls)
    main(base)
    gone_on, again = results(), len(calls) - before
    monkeypatch.setenv("BDPO_PL_CACHE", str(tmp_path / "empty"))
    before = len(calls)
    main(base)
    assert len(calls) - before == again + 1
    assert results()[1] == gone_on[1]
