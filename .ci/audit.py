"""Known vulnerabilities in the installed packages, by pip-audit; says so where its service cannot be reached.

python .ci/audit.py
"""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request

SERVICE = "https://pypi.org/pypi/pip/json"


def main() -> int:
    """pip-audit's exit status: 1 where a package has a known vulnerability. 0 where nothing could be asked."""
    try:
        with urllib.request.urlopen(SERVICE, timeout=10):
            pass
    except (urllib.error.URLError, OSError) as error:
        print(
            f"pip-audit: NOT RUN, {SERVICE} cannot be reached ({error}); nothing is known of the packages", flush=True
        )
        return 0
    command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--progress-spinner", "off"]
    return subprocess.run(command, check=False).returncode  # noqa: S603 - our own interpreter


if __name__ == "__main__":
    sys.exit(main())
