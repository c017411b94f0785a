"""The audit of packages: its verdict is pip-audit's, and silence is not taken for a clean one."""

import importlib.util
import subprocess
import urllib.error
import urllib.request
from contextlib import nullcontext
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / ".ci" / "audit.py"


@pytest.fixture
def audit():
    spec = importlib.util.spec_from_file_location("audit", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_service_out_of_reach_is_said(audit, monkeypatch, capsys):
    def fail(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("was run"))
    assert audit.main() == 0
    assert "NOT RUN" in capsys.readouterr().out


@pytest.mark.parametrize("status", [0, 1])
def test_verdict_is_handed_on(audit, monkeypatch, status):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: nullcontext())
    commands = []

    def run(command, check):
        commands.append(command)
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", run)
    assert audit.main() == status
    assert "pip_audit" in commands[0]
