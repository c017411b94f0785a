"""The endpoint against a server on this machine that plays out a script of answers."""

import itertools
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from email.utils import formatdate

import pytest
from scripted_server import answer, chat, endpoint

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.chat.completions import retry_after
from bdpo_pl.evaluation.chat.endpoint import Endpoint, EndpointError, EndpointOptions

KEY = "sk-very-secret-0123"


def test_request_is_what_the_protocol_asks_and_answers_keep_their_order(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    server = serve(lambda n, body: answer("re: " + body["messages"][-1]["content"]))
    texts = [f"question {i} ü" for i in range(20)]
    model = endpoint(server, max_tokens=7, temperature=None, parallel=5)
    assert model.reply(chat(*texts)) == [f"re: {text}" for text in texts]
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert {name: body[name] for name in body if name != "messages"} == {"model": "some-model", "max_tokens": 7}
    assert model.name == "some-model"
    assert model.reply([]) == []


def test_no_key_is_sent_if_there_is_none(serve):
    server = serve(lambda n, body: answer("yes"))
    assert endpoint(server, url=server.options["url"] + "/chat/completions").reply(chat("a")) == ["yes"]
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert (body["temperature"], body["max_tokens"]) == (0.0, 512)


def test_requests_go_out_in_parallel(serve):
    together = threading.Barrier(4, timeout=10)

    def script(n, body):
        together.wait()  # breaks unless four requests are there at a time
        return answer("yes")

    assert endpoint(serve(script), parallel=4).reply(chat(*"abcd")) == ["yes"] * 4


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_tried_again_with_growing_waits(serve, status):
    waits = []
    server = serve(lambda n, body: (status, {"error": "busy"}) if n < 4 else answer("at last"))
    assert endpoint(server, waits).reply(chat("a")) == ["at last"]
    assert waits == [1.0, 2.0, 4.0]


def test_retry_after_is_heeded(serve):
    waits = []
    headers = {1: {"Retry-After": "17"}, 2: {"Retry-After": "0"}, 3: {"Retry-After": "soon"}}
    server = serve(lambda n, body: (429, {}, headers[n]) if n < 4 else answer("yes"))
    assert endpoint(server, waits).reply(chat("a")) == ["yes"]
    assert waits == [17.0, 2.0, 4.0]


def test_retry_after_in_its_forms():
    assert retry_after(formatdate(time.time() + 100, usegmt=True)) == pytest.approx(100, abs=5)
    assert [retry_after(value) for value in (None, "-3", "nan", "inf", "", formatdate(0, usegmt=True))] == [
        *[0.0, 0.0, 0.0, 300.0, 0.0, 0.0]
    ]


def test_failure_for_good_keeps_the_answers_and_says_what_to_do(serve):
    def script(n, body):
        return (503, {"error": "overloaded"}) if body["messages"][0]["content"] == "c" else answer("yes")

    waits = []
    server = serve(script)
    with pytest.raises(EndpointError, match=r"status 503: .*overloaded.*tried 3 times; .*endpoint.parallel") as caught:
        endpoint(server, waits, retries=2, parallel=1).reply(chat(*"abcd"))
    assert [reply and reply.text for reply in caught.value.replies] == ["yes", "yes", None, None]
    assert "2 of 4 answers" in str(caught.value)
    assert server.options["url"] in str(caught.value)
    assert waits == [1.0, 2.0]
    assert isinstance(caught.value, InputError)


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (400, "endpoint.max_tokens"),
        (401, "endpoint.api_key_env"),
        (403, r"the key in \$OPENAI_API_KEY was sent"),
        (404, "endpoint.url"),
        (302, "redirects"),
    ],
)
def test_refusals_are_not_tried_again_and_never_show_the_key(serve, monkeypatch, status, remedy):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    waits = []
    headers = {"Location": "/elsewhere"}
    server = serve(lambda n, body: (status, {"error": f"Incorrect API key provided: {KEY}"}, headers))
    model = endpoint(server, waits)
    with pytest.raises(EndpointError, match=rf"status {status}: .*{remedy}") as caught:
        model.reply(chat("a"))
    assert len(server.seen) == 1
    assert waits == []
    assert KEY not in "".join(map(str, (caught.value, repr(model), repr(model.options), caught.value.__cause__)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html>welcome</html>", "not JSON: '<html>welcome"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ([], r"no 'choices\[0\]"),
        ({"error": {"message": "no such model"}}, "no such model"),
        ({"choices": []}, r"no 'choices\[0\]"),
        ({"choices": [{"text": "old style"}]}, "old style"),
        ({"choices": [{"message": {"content": None}, "finish_reason": "length"}]}, "raise endpoint.max_tokens"),
        ({"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]}, "own filter withheld it"),
        ({"choices": [{"message": {"content": [{"type": "text"}]}}]}, "is a list"),
    ],
)
def test_answers_of_another_form_are_told(serve, content, said):
    server = serve(lambda n, body: (200, content))
    with pytest.raises(EndpointError, match=said):
        endpoint(server).reply(chat("a"))
    assert len(server.seen) == 1


def test_refusal_that_the_service_tells_apart_is_the_answer(serve):
    assert endpoint(serve(lambda n, body: answer(None, refusal="I will not."))).reply(chat("a")) == ["I will not."]


def test_silence_is_tried_again_and_told(serve):
    server = serve(lambda n, body: answer("yes") if n == 2 else None)
    assert endpoint(server, timeout=0.2).reply(chat("a")) == ["yes"]
    with pytest.raises(EndpointError, match=r"no answer within 0.1 s; tried once; .*endpoint.timeout"):
        endpoint(server, timeout=0.1, retries=0).reply(chat("a"))


def test_answer_that_breaks_off_is_tried_again(serve):
    broken = (200, b'{"choices"', {"Content-Length": "1000"})
    server = serve(lambda n, body: broken if n == 1 else answer("yes"))
    waits = []
    assert endpoint(server, waits).reply(chat("a")) == ["yes"]
    assert waits == [1.0]


def test_nobody_there(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with socket.socket() as held:  # bound and not listening: nobody else can take the port
        held.bind(("127.0.0.1", 0))
        waits = []
        options = EndpointOptions(f"http://127.0.0.1:{held.getsockname()[1]}/v1", "m", retries=1)
        with pytest.raises(EndpointError, match=r"no connection.*refused.*tried 2 times; is it up") as caught:
            Endpoint(options, sleep=waits.append).reply(chat("a", "b"))
    assert caught.value.replies == [None, None]


def test_failure_wakes_those_who_wait_to_try_again(serve):
    """With no sleep of its own an endpoint waits until another request fails."""
    asked_again = threading.Event()

    def script(n, body):
        if body["messages"][0]["content"] == "busy":
            asked_again.set()
            return 429, {}, {"Retry-After": "200"}
        asked_again.wait(10)
        return 401, {}

    server = serve(script)
    start = time.monotonic()
    with pytest.raises(EndpointError, match="status 401"):
        Endpoint(EndpointOptions(**server.options)).reply(chat("busy", "forbidden"))
    assert time.monotonic() - start < 60  # the wait is 200 s
    assert len(server.seen) == 2


def test_named_key_must_be_there_and_whole(monkeypatch):
    options = {"url": "https://host/v1", "model": "m", "api_key_env": "MY_KEY"}
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(InputError, match=r"\$MY_KEY, which is not set"):
        Endpoint(EndpointOptions(**options))
    monkeypatch.setenv("MY_KEY", f"{KEY}\r\nX-Other: 1")
    with pytest.raises(InputError, match=r"\$MY_KEY holds characters") as caught:
        Endpoint(EndpointOptions(**options))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"url": "file:///etc/passwd"}, "must be an address"),
        ({"url": "localhost:8000"}, "must be an address"),
        ({"url": "http://host:port/v1"}, "must be an address"),
        ({"url": "http://[::1/v1"}, "must be an address"),
        ({"url": f"https://user:{KEY}@host/v1"}, "may hold a key"),
        ({"url": f"https://host/v1?key={KEY}"}, "may hold a key"),
        ({"model": ""}, "endpoint.model"),
        ({"max_tokens": 0}, "endpoint.max_tokens"),
        ({"temperature": -0.1}, "endpoint.temperature"),
        ({"temperature": float("nan")}, "endpoint.temperature"),
        ({"timeout": 0.0}, "endpoint.timeout"),
        ({"deadline": float("nan")}, "endpoint.deadline"),
        ({"max_bytes": 0}, "endpoint.max_bytes"),
        ({"retries": -1}, "endpoint.retries"),
        ({"parallel": 0}, "endpoint.parallel"),
    ],
)
def test_wrong_options(wrong, said):
    with pytest.raises(InputError, match=said) as caught:
        EndpointOptions(**{"url": "http://localhost:8000/v1", "model": "m", **wrong})
    assert KEY not in str(caught.value)


def test_answer_that_drips_for_ever_has_a_deadline(serve):
    server = serve(lambda n, body: (200, [itertools.repeat(b" ")]))
    with pytest.raises(EndpointError, match=r"no whole answer within 0.3 s; tried 2 times; .*endpoint.deadline"):
        endpoint(server, deadline=0.3, retries=1).reply(chat("a"))


def test_head_that_drips_for_ever_has_a_deadline():
    with socket.create_server(("127.0.0.1", 0)) as server:
        closing = threading.Event()

        def drip():
            connection, _ = server.accept()
            with connection, suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
                while not closing.wait(0.01):
                    connection.sendall(b"x")

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        options = EndpointOptions(f"http://127.0.0.1:{server.getsockname()[1]}/v1", "m", deadline=0.3, retries=0)
        try:
            with pytest.raises(EndpointError, match=r"no whole answer within 0\.3 s"):
                Endpoint(options).reply(chat("a"))
        finally:
            closing.set()
            thread.join(10)


def test_answer_without_end_is_not_read_to_its_end(serve):
    sent = itertools.count()
    server = serve(lambda n, body: (200, [(b"x" * 1000 for _ in sent)]))
    with pytest.raises(EndpointError, match=r"longer than 50000 bytes.*endpoint.max_bytes"):
        endpoint(server, max_bytes=50_000).reply(chat("a"))
    assert next(sent) < 100_000
    assert len(server.seen) == 1


@pytest.mark.parametrize("shown", [KEY, " ".join(KEY), f"{KEY[:5]}\n{KEY[5:]}", f"{KEY[:5]}\u200b{KEY[5:]}"])
def test_key_is_shown_in_no_field_and_in_no_form(serve, monkeypatch, shown):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    bare = "".join(shown.split())
    assert endpoint(serve(lambda n, body: answer(f"it is {shown}!"))).reply(chat("a")) == ["it is [key]!"]
    assert endpoint(serve(lambda n, body: answer(None, refusal=f"no: {shown}"))).reply(chat("a")) == ["no: [key]"]
    choice = {"message": {"content": None}, "finish_reason": f"{shown} " + "x" * 5000}
    for reply in (
        (200, {"choices": [choice]}),
        (400, {"error": shown}),
        (200, {"other": shown}),
        (200, shown.encode()),
    ):
        with pytest.raises(EndpointError) as caught:
            endpoint(serve(lambda n, body, reply=reply: reply)).reply(chat("a"))
        assert bare not in "".join(str(caught.value).split()).replace("\u200b", "")
        assert len(str(caught.value)) < 1000


def test_escape_codes_do_not_reach_the_terminal(serve, capsys):
    bad = "\x1b]0;PWNED\x07\x1b[31mRED\x9b2J \u202eabc"
    choice = {"message": {"content": None}, "finish_reason": bad}
    for reply in ((400, {"error": bad}), (200, {"choices": [choice]}), (200, bad.encode())):
        with pytest.raises(EndpointError) as caught:
            endpoint(serve(lambda n, body, reply=reply: reply)).reply(chat("a"))
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(str(caught.value))
    from rich.table import Table

    from bdpo_pl.console import get_console

    table = Table(title=bad)
    table.add_column(bad)
    table.add_row(bad)
    get_console().print(table, bad, "\ud800", "a 👩\u200d🔬 b")
    printed = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\ud800"} & set(printed)
    assert r"\x1b]0;PWNED" in printed
    assert "👩\u200d🔬" in printed


def test_half_a_surrogate_pair_is_replaced(serve):
    raw = rb'{"choices": [{"message": {"content": "a \ud800 b \ud83d\ude42"}}]}'
    assert endpoint(serve(lambda n, body: (200, raw))).reply(chat("\ud800")) == ["a \ufffd b 🙂"]


def test_signal_ends_the_waiting_at_once(serve):
    class Stop(BaseException):
        pass

    def raised(number, frame):
        raise Stop

    server = serve(lambda n, body: os.kill(os.getpid(), signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, raised)
    try:
        with pytest.raises(Stop):
            endpoint(server, timeout=15.0).reply(chat("a"))
    finally:
        signal.signal(signal.SIGUSR1, before)
