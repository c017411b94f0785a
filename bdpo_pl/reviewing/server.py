"""The server of the page. It serves only this machine, and only requests with the token of the link.

A page of another site, open in the same browser, can send requests here, but it does not know the token, which every
request needs. `Host` must be this server's, so that another site cannot use a name that resolves to this address (DNS
rebinding).
"""

from __future__ import annotations

import hmac
import json
import secrets
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from bdpo_pl.errors import InputError
from bdpo_pl.reviewing.rows import ReviewFile

_PAGE = Path(__file__).with_name("review.html")
_MOST_BYTES = 1_000_000
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def make_server(file: ReviewFile, port: int = 0) -> tuple[ThreadingHTTPServer, str]:
    """Make a server on the loopback address; return it and the link to its page.

    Args:
        file: the rows.
        port: port of the server; 0 for any that is free.

    Raises:
        InputError: the port is in use.
    """
    token = secrets.token_urlsafe(24)

    class Handler(_Handler):
        pass

    Handler.file, Handler.token = file, token
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise InputError(f"port {port} is not available ({error.strerror}); leave --port out") from error
    server.daemon_threads = True
    Handler.host = f"127.0.0.1:{server.server_address[1]}"
    return server, f"http://{Handler.host}/?token={token}"


class _Handler(BaseHTTPRequestHandler):
    file: ReviewFile
    token: str
    host: str

    def do_GET(self) -> None:
        """Return the page, or the rows."""
        path = self._allowed()
        if path == "/":
            nonce = secrets.token_urlsafe(16)
            text = _PAGE.read_text(encoding="utf-8").replace("{{nonce}}", nonce)
            self._send(200, text.encode(), "text/html; charset=utf-8", nonce)
        elif path == "/rows":
            shown = ("prompt", "response", "rejected", "category", "suite", "attack", self.file.kind)
            rows = [{name: row.get(name) for name in shown if row.get(name) is not None} for row in self.file.rows]
            self._json(200, {"kind": self.file.kind, "name": self.file.path.name, "rows": rows})
        elif path is not None:
            self._json(404, {"error": "nothing here"})

    def do_POST(self) -> None:
        """Save an answer."""
        path = self._allowed()
        if path is None:
            return
        length = self.headers.get("Content-Length", "")
        if path != "/answer" or not length.isdigit() or int(length) > _MOST_BYTES:
            self._json(400, {"error": "that is not a valid answer"})
            return
        try:
            given = json.loads(self.rfile.read(int(length)))
            index, value = given["index"], given["value"]
            if type(index) is not int or not isinstance(value, str | None):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            self._json(400, {"error": "that is not a valid answer"})
            return
        try:
            self.file.answer(index, value)
        except InputError as error:
            self._json(400, {"error": str(error)})
            return
        self._json(200, {"left": self.file.left})

    def _allowed(self) -> str | None:
        """Return the requested path if the request has the token of the link; otherwise refuse it and return None."""
        asked = urlsplit(self.path)
        token = parse_qs(asked.query).get("token", [""])[0] or self.headers.get("X-Token", "")
        if self.headers.get("Host") != self.host or not hmac.compare_digest(token.encode(), self.token.encode()):
            self._json(403, {"error": "open the link that the command printed"})
            return None
        return asked.path

    def _json(self, status: int, value: dict[str, Any]) -> None:
        # Escaped: a text of the file may hold half of a surrogate pair, which has no UTF-8.
        self._send(status, json.dumps(value).encode(), "application/json; charset=utf-8")

    def _send(self, status: int, body: bytes, kind: str, nonce: str = "none") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in _HEADERS.items():
            self.send_header(name, value.replace("{nonce}", nonce))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the token is in the first line of a request."""
