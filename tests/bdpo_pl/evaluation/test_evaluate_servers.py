"""The command that measures safety, with judges, attackers and models behind servers."""

import json
import signal
from pathlib import Path

import pytest
from children import launch
from evaluating import REFUSAL, Server, asked, endpoint_of, fails, judged_by, rates, results
from makers import write_jsonl

import bdpo_pl.evaluation.answerers as asking
import bdpo_pl.evaluation.chat.endpoint as endpoint
from bdpo_pl.evaluate import main
from bdpo_pl.evaluation.verdict_log import WARNING
from bdpo_pl.refusals import rules_sha256

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def test_answers_are_kept_under_a_warning_and_judged_by_another_judge(base, answers, serve, capsys):
    main([*base, "--keep_answers"])
    assert "answers, to handle with care" in capsys.readouterr().out
    first, *lines = Path("runs/evaluation/verdicts.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(first)["warning"] == WARNING
    assert sum("wombat" in line for line in lines) == 8
    assert len(answers.asked) == 10
    server = serve(lambda n, body: "unsafe" if "quokka 1" in body["messages"][0]["content"] else "safe")
    main([*base, *judged_by(server)])
    assert len(answers.asked) == 10
    report = results()
    # Harm by the judge; over-refusal by the phrases, for this judge tells none.
    assert rates(report["models"][0]) == pytest.approx({"harm": 1 / 6, "good": 0.25})
    assert report["judge"]["judge"] == "llama_guard"
    assert report["agreement"] is None


def test_judge_of_harm_gives_an_attack_success(base, answers, serve, capsys):
    server = serve(lambda n, body: "safe" if n % 2 else "unsafe")
    main([*base, *judged_by(server)])
    printed = capsys.readouterr().out
    assert "attack success, harm, n = 6" in printed
    assert "not refused" not in printed
    assert "its agreement with people is not measured here" in " ".join(printed.split())
    # It does not say whether an answer refuses, so the phrases decide on the benign suite.
    report = results()
    assert report["judge_note"].endswith(". Judge of over-refusal: phrases, of which that says nothing.")
    assert report["over_refusal_judge"]["sha256"] == rules_sha256()
    html = Path("runs/evaluation/report.html").read_text(encoding="utf-8")
    assert "good, n = 4; judge: phrases" in html
    assert "harm, n = 6; judge: llama_guard" in html
    # Neither does it where everything is on record, or where no suite asks for it.
    main([*base, *judged_by(server)])
    assert results() == report
    main(["--suites=harm:harmful=harmful.jsonl", *base[:1], *base[2:], *judged_by(server)])
    assert "phrases" not in json.dumps(results())


def test_gcg_and_refinement(base, serve, capsys):
    proposals = serve(lambda n, body: json.dumps({"improvement": "more", "prompt": f"try {n} quokka"}))
    command = [
        *base, "--attacks.gcg.steps=1", "--attacks.gcg.search_width=4", "--attacks.gcg.suffix=! !",
        "--attacks.refinement.streams=2", "--attacks.refinement.steps=1", *endpoint_of(proposals, "attacks.attacker"),
        "--attacks.max_prompts=2", "--attacks.folder=states",
    ]  # fmt: skip
    main(command)
    said = capsys.readouterr()
    model = results()["models"][0]
    assert list(rates(model)) == ["harm", "good", "harm+gcg", "harm+pair"]
    assert [result["overall"]["failed"]["count"] for result in model["suites"][2:]] == [2, 2]
    assert "1 steps on 2 prompts" in model["attacks"]["gcg"] or "2 steps on 2 prompts" in model["attacks"]["gcg"]
    assert "4 queries" in model["attacks"]["pair"]
    assert len(proposals.seen) == 4
    states = list(Path("states").iterdir())
    assert len(states) == 4
    assert all("do not publish" in path.read_text().splitlines()[0] for path in states)
    folder = Path("runs/evaluation")
    everything = said.out + said.err + "".join(path.read_text(encoding="utf-8") for path in folder.iterdir())
    assert "quokka" not in everything
    # Again: from what is on record, asking nobody.
    before = results()
    main(command)
    assert len(proposals.seen) == 4
    assert results() == before


def test_tree_genetic_framings_and_artifacts_under_a_budget(base, serve, capsys):
    def propose(n, body):
        topic = body["messages"][0]["role"] == "user"
        return "Yes." if topic else json.dumps({"improvement": "more", "prompt": f"try {n} quokka"})

    artifact = {"goal": "harmful quokka 1 ?", "category": "fraud", "prompt": "pray , quokka ?"}
    Path("a.json").write_text(
        json.dumps({"parameters": {"method": "PAIR", "model": "vicuna"}, "jailbreaks": [artifact]})
    )
    proposals = serve(propose)
    command = [
        *base, "--attacks.tree.width=1", "--attacks.tree.branching=1", *endpoint_of(proposals, "attacks.attacker"),
        "--attacks.genetic.population=2", "--attacks.genetic.elite=1", "--attacks.artifacts=a.json",
        "--attacks.max_prompts=2",
    ]  # fmt: skip
    main([*command, "--budget.requests=5", "--budget.minutes=600"])
    model = results()["models"][0]
    assert list(rates(model)) == ["harm", "good", "artifact+PAIR_vicuna", "harm+genetic", "harm+tap"]
    # Two requests of two each: a level of the tree is one, a generation two.
    assert [curve["requests"][-1] for curve in model["curves"].values()] == [2, 2]
    assert {curve["count"] for curve in model["curves"].values()} == {2}
    assert "genetic: success by number of requests" in Path("runs/evaluation/report.html").read_text()
    assert "quokka" not in Path("runs/evaluation/evaluation.json").read_text()
    assert "one step of genetic takes 2" in fails([*command, "--budget.requests=3"], capsys)


def test_judge_that_goes_away_leaves_what_it_said_and_the_same_command_goes_on(base, answers, serve, capsys):
    down = []
    server = serve(lambda n, body: 503 if down and len(server.seen) > down[0] else "unsafe")
    command = [*base, "--generation.batch_size=2", *judged_by(server)]
    main([*command, "--folder=whole"])
    server.seen.clear()
    answers.asked.clear()
    down.append(4)
    said = fails([*command, "--keep_answers"], capsys)
    for part in ("status 503", "tried 2 times", "verdicts.jsonl: the same command continues from there"):
        assert part in said
    # Two batches of two, one request that failed, and its second try.
    assert len(server.seen) == 6
    down.clear()
    main([*command, "--keep_answers"])
    assert len(server.seen) == 6 + 6
    assert len(answers.asked) == len(set(answers.asked)) == 10
    assert results() == results("whole")


def test_judge_that_was_never_there(base, answers, monkeypatch, capsys):
    monkeypatch.setattr(endpoint, "_LONGEST_BACKOFF", 0.0)
    server = Server(None)
    server.server_close()
    said = fails([*base, *judged_by(server)], capsys)
    assert f"{server.url}/chat/completions: no connection" in said
    assert "is it up, and are judge.endpoint.url, judge.endpoint.timeout and judge.endpoint.deadline right?" in said


def test_killed_evaluation_goes_on_where_it_was(base, serve, monkeypatch):
    """With the models' own answers, by a real SIGKILL while the judge is asked."""
    process = []

    def script(n, body):
        if process and n == 4:
            process[0].kill()
        return "unsafe" if "1" in body["messages"][0]["content"] else "safe"

    server = serve(script)
    command = [*base, "--generation.batch_size=2", "--keep_answers", *judged_by(server)]
    process.append(launch("bdpo_pl.evaluate", command))
    process[0].join(300)
    assert process.pop().exitcode == -signal.SIGKILL
    lines = [json.loads(line) for line in Path("runs/evaluation/verdicts.jsonl").read_text().splitlines()]
    assert [sum(kind in line for line in lines) for kind in ("answer", "judged")] == [4, 2]
    first, generated, generate = asked(server), [], asking.generate
    monkeypatch.setattr(asking, "generate", lambda m, t, ids, **o: generated.extend(ids) or generate(m, t, ids, **o))
    main(command)
    # Ten prompts: four had their answers, and two of those their verdicts.
    assert len(generated) == 6
    assert len(server.seen) == 4 + 8
    assert sorted(first[:2] + asked(server)[4:]) == sorted(set(asked(server)))
    gone_on = results()
    main([*command, "--folder=whole"])
    assert gone_on == results("whole")


def test_model_behind_a_server(base, answers, serve, capsys):
    def script(n, body):
        prompt = body["messages"][0]["content"]
        return REFUSAL if "harmful" in prompt else f"<think>wombat {n}</think>sure"

    server = serve(script)
    command = [*base, f"there={server.url}#org/name", "--server.parallel=3", "--generation.max_thought_tokens=50"]
    main(command)
    report = results()
    _, there = report["models"]
    assert (there["label"], there["source"]) == ("there", f"org/name at {server.url}")
    assert rates(there) == {"harm": 0.0, "good": 0.0}
    assert there["changes"]["harm"]["value"] == pytest.approx(-5 / 6)
    assert len(server.seen) == 10
    assert any("there is behind a server" in note for note in report["notes"])
    # Again: from what is on record.
    main(command)
    assert len(server.seen) == 10


def test_server_that_takes_neither_temperature_nor_max_tokens(base, serve, capsys):
    bodies = []

    def script(n, body):
        bodies.append(body)
        return 400 if "max_tokens" in body or "temperature" in body else REFUSAL

    command = [f"there={serve(script).url}#o", base[1]]
    said = fails(command, capsys)
    assert "set generation.max_new_tokens and server.temperature to values that it accepts" in said
    assert "or server.max_tokens_name to max_completion_tokens" in said
    assert "endpoint." not in said
    main([*command, "--server.temperature=null", "--server.max_tokens_name=max_completion_tokens"])
    assert bodies[-1].keys() == {"model", "messages", "max_completion_tokens"}
    facts = results()["facts"]
    assert facts["responses"].startswith("greedy except behind servers, up to 64")
    assert facts["temperature of servers"] == "their own"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--server.api_key_env=MY_KEY", "server.api_key_env names $MY_KEY, which is not set"),
        ("--generation.use_template=false", "a server renders its own chat template"),
        ("http://me:secret@h/v1#m", "the address in models holds more than an address"),
    ],
)
def test_faults_of_a_server_are_found_before_another_model_answers(base, answers, capsys, monkeypatch, option, said):
    monkeypatch.delenv("MY_KEY", raising=False)
    assert said in (found := fails([*base, "http://127.0.0.1:1/v1#m", option], capsys))
    assert "secret" not in found
    assert answers.asked == []


def test_labelled_answers_are_judged_once_and_one_without_a_verdict_costs_no_other(base, answers, serve):
    texts = ("bad", "fine", "odd")
    write_jsonl(
        Path("labels.jsonl"), [{"prompt": "why ?", "response": text, "unsafe": text == "bad"} for text in texts]
    )
    said = {"bad": "unsafe", "odd": "hm"}
    server = serve(lambda n, body: said.get(body["messages"][-1]["content"], "safe"))
    command = [*base, *judged_by(server), "--labels=labels.jsonl"]
    main(command)
    report = results()
    assert (report["agreement"]["hits"], report["agreement"]["rejections"]) == (1, 1)
    assert "Left out of labels.jsonl: 1 without a verdict of the judge." in report["notes"]
    before = len(server.seen)
    main(command)
    assert [messages[-1]["content"] for messages in server.seen[before:]] == ["odd"] * 3
    assert results() == report


def test_counts_are_those_of_the_models_answers_and_settings_are_told(base, answers, serve):
    write_jsonl(Path("labels.jsonl"), [{"prompt": "why ?", "response": text, "unsafe": "false"} for text in ("", "so")])
    server = serve(lambda n, body: "safe")
    answers.rule = lambda model, prompt: "" if "benign quokka 1" in prompt else "so"
    options = ["--generation.max_thought_tokens=2", "--generation.chat_template_kwargs={enable_thinking: false}"]
    main([*base, *judged_by(server), "--labels=labels.jsonl", *options])
    report = results()
    assert report["judge_notes"] == {"blank answers": 1}
    assert "blank answers" not in report["judge"]
    assert report["facts"]["thoughts"] == "up to 2 tokens"
    assert report["facts"]["chat template's variables"] == '{"enable_thinking": false}'
    assert "in this run: blank answers" in Path("runs/evaluation/report.html").read_text(encoding="utf-8")


def test_answers_that_are_made_to_begin_by_going_along(base, answers, serve, capsys):
    main([*base, "--attacks.prefill", "--export_answers=answers.jsonl"])
    assert list(rates(results()["models"][0])) == ["harm", "good", "harm+prefill"]
    begun = [prompt for prompt in answers.asked if "Sure, here is" in prompt]
    assert len(begun) == 6
    # After the head of the assistant's turn.
    assert all("assistant" in prompt.partition("Sure, here is")[0] for prompt in begun)
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text(encoding="utf-8").splitlines()]
    made = [row for row in rows if row["attack"] == "prefill"]
    assert len(made) == 6
    assert all(row["response"].startswith("Sure, here is") for row in made)
    server = serve(lambda n, body: "sure")
    assert "attacks.prefill need a model that is loaded here" in fails(
        [f"{server.url}#m", *base[1:], "--attacks.prefill"], capsys
    )
