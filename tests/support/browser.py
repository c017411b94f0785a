"""Opens a report in headless Chromium, and tells what its reader would see and what the browser complained of.

Speaks the DevTools protocol over a pair of pipes, which needs no package beside the browser.
"""

import json
import os
import select
import shutil
import subprocess
import time
from base64 import b64decode
from dataclasses import dataclass, field
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip


def find_chromium() -> str:
    """The browser's path; skips the test where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no chromium here to open the report in: apt-get install chromium")
    return path


@dataclass
class Visit:
    """What came of opening a page.

    Attributes:
        title: of the document.
        text: as shown.
        complaints: errors and warnings of the console, exceptions of scripts, and refusals of the page's policy.
        requests: URLs asked for, beside the page itself and what it carries in `data:`.
        drawings: (width, height) in CSS pixels of each SVG.
        overflow: CSS pixels by which the page is wider than the window.
        sideways: drawings that must be scrolled sideways.
        nameless: SVGs with no description, and links or regions with no name.
    """

    title: str = ""
    text: str = ""
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    drawings: list[tuple[float, float]] = field(default_factory=list)
    overflow: int = 0
    nameless: int = 0
    sideways: int = 0


LOOK = """JSON.stringify({
  title: document.title,
  text: document.body.innerText,
  drawings: [...document.querySelectorAll('svg')].map(s => [s.getBoundingClientRect().width, s.getBoundingClientRect().height]),
  sideways: [...document.querySelectorAll('figure > .scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length,
  overflow: Math.max(0, document.documentElement.scrollWidth - window.innerWidth),
  nameless: [...document.querySelectorAll('svg[role=img], [role=region]')].filter(e => !e.getAttribute('aria-label')).length
    + [...document.querySelectorAll('a')].filter(a => !a.innerText.trim()).length
    + [...document.querySelectorAll('svg:not([role=img])')].length
})"""  # noqa: E501


class Browser:
    """Headless Chromium with a profile of its own; a context manager."""

    def __init__(self, profile: Path):
        self.profile = profile

    def __enter__(self):
        command = [find_chromium(), *FLAGS, f"--user-data-dir={self.profile}"]
        # Chromium reads commands from descriptor 3 and answers on 4.
        read_commands, self._out = os.pipe()
        self._in, write_answers = os.pipe()
        shell = 'exec 3<&"$0" 4>&"$1"; shift; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, str(read_commands), str(write_answers), *command],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        self._buffer, self._number, self._events = b"", 0, []
        return self

    def __exit__(self, *_):
        try:
            self._call("Browser.close")
            self._process.wait(20)
        except (EOFError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def visit(self, path, *, width=1000, height=900, dark=False, paper=False, screenshot=None, script=None):
        """Open the file at `path`, or a link, wait until it has loaded, and look at it.

        Optionally run a `script` of the visitor before, until what it promises has come, and keep a picture of all.
        """
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        try:
            for domain in ("Page", "Runtime", "Log", "Network"):
                self._call(f"{domain}.enable", session)
            self._call("Emulation.setDeviceMetricsOverride", session,
                       width=width, height=height, deviceScaleFactor=1, mobile=False)  # fmt: skip
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            self._call("Emulation.setEmulatedMedia", session, media="print" if paper else "screen", features=[scheme])
            self._events.clear()
            url = path if str(path).startswith("http") else Path(path).resolve().as_uri()
            self._call("Page.navigate", session, url=url)
            self._await("Page.loadEventFired")
            if script is not None:
                done = self._call("Runtime.evaluate", session, expression=script, awaitPromise=True)
                assert "exceptionDetails" not in done, done["exceptionDetails"]
            looked = self._call("Runtime.evaluate", session, expression=LOOK)["result"]["value"]
            visit = Visit(**json.loads(looked))
            if screenshot is not None:
                image = self._call("Page.captureScreenshot", session, format="png", captureBeyondViewport=True)
                Path(screenshot).write_bytes(b64decode(image["data"]))
            for event in self._events:
                self._note(event["method"], event.get("params", {}), visit)
            return visit
        finally:
            self._call("Target.closeTarget", targetId=target)

    @staticmethod
    def _note(method, params, visit):
        if method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if params.get("type") != "Document" and not url.startswith("data:"):
                visit.requests.append(url)
        elif method == "Log.entryAdded":
            visit.complaints.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            visit.complaints.append(params["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            visit.complaints.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))

    def _call(self, method, session=None, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(self._out, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._events.append(answer)

    def _await(self, method):
        while not any(event.get("method") == method for event in self._events):
            self._events.append(self._receive())

    def _receive(self, patience=60):
        deadline = time.monotonic() + patience
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"the browser has said nothing for {patience} s")
            received = os.read(self._in, 1 << 20)
            if not received:
                raise EOFError("the browser has closed")
            self._buffer += received
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)
