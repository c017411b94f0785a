"""The audit of packages: its verdict is pip-audit's, and silence is not taken for a clean one."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / ".ci" / "audit.py"
CLEAN = {"name": "torch", "version": "2.13.0", "vulns": []}
UNKNOWN = {"name": "bdpo-pl", "skip_reason": "not found on the service"}
VULNERABLE = {"name": "left", "version": "1.0", "vulns": [{"id": "CVE-2026-1", "fix_versions": ["1.1"]}]}


@pytest.fixture
def run_audit(monkeypatch, capsys):
    """Runs the audit with a pip-audit that prints `output` and ends with `status`; exit status and what is printed."""
    spec = importlib.util.spec_from_file_location("audit", FILE)
    audit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(audit)

    def run(output, status=0, stderr=""):
        def answer(command, **_):
            assert "pip_audit" in command
            return subprocess.CompletedProcess(command, status, output, stderr)

        monkeypatch.setattr(subprocess, "run", answer)
        return audit.main(), capsys.readouterr().out

    return run


def test_service_out_of_reach_is_said(run_audit):
    status, said = run_audit("", 1, "Traceback\nConnectionError: no route\n")
    assert status == 0
    assert "NOT RUN" in said
    assert "no route" in said


def test_service_that_knows_no_package_is_no_clean_bill(run_audit):
    status, said = run_audit(json.dumps({"dependencies": [UNKNOWN, UNKNOWN]}))
    assert status == 0
    assert "NOT RUN" in said
    assert "2 packages" in said


@pytest.mark.parametrize(
    ("packages", "status", "says"),
    [
        ([CLEAN, UNKNOWN], 0, "1 packages audited, 1 not known to its service, 0 found"),
        ([CLEAN, VULNERABLE], 1, "left 1.0: CVE-2026-1, fixed in 1.1"),
    ],
)
def test_verdict_is_handed_on(run_audit, packages, status, says):
    # pip-audit itself exits with 1 where it found something.
    found, said = run_audit(json.dumps({"dependencies": packages}), status)
    assert found == status
    assert says in said
