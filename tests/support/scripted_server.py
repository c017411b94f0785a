"""An endpoint on this machine that answers by a script, and what tests ask of it."""

import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from bdpo_pl.evaluation.chat.endpoint import Endpoint, EndpointOptions


def chat(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def answer(text, **message):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}]}


class Scripted(ThreadingHTTPServer):
    """Answers its n-th request with `script(n, request)`: (status, JSON value or bytes, headers), or None: nothing."""

    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen, self.lock = script, [], threading.Lock()
        self.closing = threading.Event()
        self.options = {"url": f"http://127.0.0.1:{self.server_port}/v1", "model": "some-model"}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), body))
            n = len(self.server.seen)
        said = self.server.script(n, body)
        if said is None:
            self.server.closing.wait(20)
            return
        status, content, *headers = said
        streamed = isinstance(content, list) and content and not isinstance(content[0], dict)
        content = content if streamed or isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        length = {} if streamed else {"Content-Length": str(len(content))}
        for name, value in {**length, **(headers[0] if headers else {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if isinstance(content, list):  # piece by piece, as long as somebody reads
            with suppress(OSError):
                for piece in content[0]:
                    self.wfile.write(piece)
                    self.wfile.flush()
                    if self.server.closing.wait(0.01):
                        break
            return
        self.wfile.write(content)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *args):
        pass


def endpoint(server, waits=None, **options):
    waits = [] if waits is None else waits
    return Endpoint(EndpointOptions(**{**server.options, **options}), sleep=waits.append)
