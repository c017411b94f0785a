"""Fixtures of the tests that run the command that measures safety."""

import threading

import pytest
from evaluating import CATEGORIES, EVIL, REFUSAL, Server
from makers import build_model, build_tokenizer, large, preference_rows, write_jsonl

import bdpo_pl.evaluation.answerers as asking
import bdpo_pl.evaluation.chat.endpoint as endpoint
from bdpo_pl.forward.generation import Response


@pytest.fixture
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name, size in (("harmful", 6), ("benign", 4)):
        rows = [{"prompt": f"{name} quokka {i} ?", "category": CATEGORIES[i % 3]} for i in range(size)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    for split, seed in (("train", 0), ("held_out", 1)):
        write_jsonl(tmp_path / f"{split}.jsonl", preference_rows(6, seed))


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    large(build_model()).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def base(model_dir):
    return [f"before={model_dir}", "--suites=harm:harmful=harmful.jsonl,good:benign=benign.jsonl",
            "--generation.max_new_tokens=3"]  # fmt: skip


@pytest.fixture
def answers(monkeypatch):
    """Models answer by a rule, and what they are asked is kept."""

    class Answers:
        @staticmethod
        def rule(model, prompt):
            # The one whose weights are large has been aligned.
            aligned = model.get_input_embeddings().weight.std() > 0.1
            refuses = "harmful" in prompt if aligned else "harmful quokka 2" in prompt or "benign quokka 3" in prompt
            return REFUSAL if refuses else f"sure , wombat {EVIL} {prompt}"

    found = Answers()
    found.asked = []

    def generate(model, tokenizer, ids, *, on_response, **_):
        for number, prompt in enumerate(map(tokenizer.decode, ids)):
            found.asked.append(prompt)
            on_response(number, Response(found.rule(model, prompt), 3, True))

    monkeypatch.setattr(asking, "generate", generate)
    return found


@pytest.fixture
def serve(monkeypatch):
    # No waiting between tries.
    monkeypatch.setattr(endpoint, "_LONGEST_BACKOFF", 0.0)
    servers = []

    def start(script):
        servers.append(Server(script))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
