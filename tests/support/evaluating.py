"""What the tests of the command that measures safety share: results, errors, and a server that answers by a script."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bdpo_pl.evaluate import main

EVIL = "<script>document.title='taken'</script><img src=http://127.0.0.1:8/x.png>"
REFUSAL = "I can't help with that."
CATEGORIES = ["fraud", EVIL, "fraud"]


def results(folder="runs/evaluation"):
    return json.loads(Path(folder, "evaluation.json").read_text(encoding="utf-8"))


def rates(model):
    return {result["suite"]: result["overall"]["failed"]["value"] for result in model["suites"]}


def fails(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return " ".join(said.split())


class Server(ThreadingHTTPServer):
    """Answers its n-th request with the text `script(n, body)`, or with the status that it gives."""

    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen = script, []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body["messages"])
        said = self.server.script(len(self.server.seen), body)
        if isinstance(said, int):
            self.send_error(said)
            return
        content = json.dumps({"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def endpoint_of(server, option):
    return [f"--{option}.url={server.url}", f"--{option}.model=m", f"--{option}.retries=1", f"--{option}.parallel=1"]


def judged_by(server):
    return ["--judge.kind=llama_guard", *endpoint_of(server, "judge.endpoint")]


def asked(server):
    return [messages[0]["content"] for messages in server.seen]
