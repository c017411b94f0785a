"""What a server says of its answers, its thoughts among them, and several servers that share the questions."""

import threading

import pytest
from scripted_server import answer, chat, endpoint

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.answerers import GenerationOptions, ServedAnswerer
from bdpo_pl.evaluation.chat.completions import Completion
from bdpo_pl.evaluation.chat.endpoint import Endpoint, EndpointError, EndpointOptions
from bdpo_pl.evaluation.oddities import oddities
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt
from bdpo_pl.evaluation.verdict_log import Answer


def choice(text, finish_reason="stop", usage=None, **message):
    return 200, {
        "choices": [{"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish_reason}],
        "usage": usage,
    }


@pytest.mark.parametrize(
    ("said", "completion"),
    [
        (choice("whole", usage={"completion_tokens": 7}), Completion("whole", True, 7)),
        (choice("cut", "length", {"completion_tokens": 64}), Completion("cut", False, 64)),
        (choice("withheld from here", "content_filter"), Completion("withheld from here", False)),
        (choice("", "stop", {"completion_tokens": True}), Completion("")),
        (choice("yes", None, "many"), Completion("yes")),
        (choice("yes", reasoning_content="hm"), Completion("yes", thought="hm")),
        (choice("yes", reasoning="hm", reasoning_content=None), Completion("yes", thought="hm")),
        (choice(None, "length", reasoning_content="hm"), Completion("", False, thought="hm")),
    ],
)
def test_what_a_server_says_of_its_answer(serve, said, completion):
    server = serve(lambda n, body: said)
    assert Endpoint(EndpointOptions(**server.options)).completions(chat("a")) == [completion]


def test_judge_that_only_thought_is_told_to_have_more_tokens(serve):
    server = serve(lambda n, body: choice(None, "length", reasoning_content="hm"))
    with pytest.raises(EndpointError, match=r"only a thought; .* raise endpoint\.max_tokens"):
        Endpoint(EndpointOptions(**server.options)).reply(chat("a"))


def test_served_model_says_which_answers_it_cut_and_what_it_thought(serve):
    said = {
        "whole": choice("Sure.", usage={"completion_tokens": 2}),
        "cut": choice("Sure, fir", "length", {"completion_tokens": 3}),
        "thinks": choice(None, "length", {"completion_tokens": 9}, reasoning_content="Hm."),
        "thought": choice("<think>Well.</think>Sure.", reasoning_content="Hm."),
        "silent": choice(" ", reasoning_content="Hm."),
    }
    server = serve(lambda n, body: said[body["messages"][0]["content"]])
    answerer = ServedAnswerer(EndpointOptions(**server.options), GenerationOptions())
    answers = answerer.answer(answerer.questions([EvaluationPrompt(text, text) for text in said]))
    assert answers == [
        Answer("Sure.", 2, True),
        Answer("Sure, fir", 3, False),
        Answer("", 9, False, "Hm.", unfinished_thought=True),
        Answer("Sure.", 0, True, "Hm.\nWell."),
        Answer("", 0, True, "Hm."),
    ]
    found = [oddities("why ?", a.text, a.finished, a.unfinished_thought) for a in answers]
    assert found == [(), ("cut off",), ("unfinished thought",), (), ("blank",)]


def test_several_servers_share_the_questions(serve):
    """The first request to each waits for one to the other."""
    both = threading.Barrier(2, timeout=60)

    def slow(name):
        def script(n, body):
            if n == 1:
                both.wait()
            return answer(f"{name}: " + body["messages"][-1]["content"])

        return script

    servers = [serve(slow("a")), serve(slow("b"))]
    url = ",".join(server.options["url"] for server in servers)
    texts = [f"question {i}" for i in range(6)]
    replies = endpoint(servers[0], url=url, parallel=1).reply(chat(*texts))
    assert [reply.partition(": ")[2] for reply in replies] == texts
    assert {reply[0] for reply in replies} == {"a", "b"}


def test_error_names_the_server_that_failed(serve):
    sound, broken = serve(lambda n, body: answer("yes")), serve(lambda n, body: (200, b"no JSON"))
    url = f"{sound.options['url']},{broken.options['url']}"
    with pytest.raises(EndpointError, match=f"{broken.options['url']}/chat/completions: the answer is not JSON"):
        endpoint(sound, url=url, parallel=1).reply(chat(*"abcd"))
    with pytest.raises(InputError, match="must be an address"):
        endpoint(sound, url=sound.options["url"] + ",")
