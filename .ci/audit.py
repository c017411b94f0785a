"""Known vulnerabilities in the installed packages, by pip-audit; says so where its service does not know them.

python .ci/audit.py
"""

from __future__ import annotations

import json
import subprocess
import sys


def main() -> int:
    """1 where a package has a known vulnerability; 0 where none has, or where nothing could be asked."""
    command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--progress-spinner", "off"]
    result = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, check=False)  # noqa: S603
    try:
        packages = json.loads(result.stdout)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        reason = result.stderr.strip().splitlines()[-1:] or [f"exit status {result.returncode}"]
        print(f"pip-audit: NOT RUN ({reason[0]}); nothing is known of the packages")
        return 0
    found = [(package, vulnerability) for package in packages for vulnerability in package.get("vulns", ())]
    for package, vulnerability in found:
        fixed = ", ".join(vulnerability["fix_versions"]) or "no release"
        print(f"pip-audit: {package['name']} {package['version']}: {vulnerability['id']}, fixed in {fixed}")
    skipped = sum("skip_reason" in package for package in packages)
    if skipped == len(packages):
        print(f"pip-audit: NOT RUN, its service knows none of the {skipped} packages here; nothing is known of them")
    else:
        audited = len(packages) - skipped
        print(f"pip-audit: {audited} packages audited, {skipped} not known to its service, {len(found)} found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
