"""A page to label answers or write chosen ones: `python -m bdpo_pl.review FILE`.

FILE is JSONL of one of two kinds. Rows with `prompt` and `response` get a `label`, refusal or compliance, as
`bdpo_pl.evaluate --labels` reads them. Rows with `prompt` and `rejected`, as `--refine` writes them, get a `chosen`.
Every answer is saved at once, in the same file. The page is served only to this machine, and only with the link.
"""

from __future__ import annotations

import sys
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from bdpo_pl.cli.quick import refuse
from bdpo_pl.errors import InputError

if TYPE_CHECKING:
    from bdpo_pl.reviewing.rows import ReviewFile

_LAST_PORT = 65535
_HELP = "usage: bdpo review FILE [--port N] [--open false]\n\n" + (__doc__ or "").split("\n\n", 1)[1]


def main(args: list[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    given = list(sys.argv[1:] if args is None else args)
    if not given or "--help" in given or "-h" in given:
        print(_HELP)
        sys.exit(0)
    files, options = [], {"--port": "0", "--open": "true"}
    while given:
        name, has_value, value = given.pop(0).partition("=")
        if not name.startswith("--"):
            files.append(name + has_value + value)
        elif name not in options:
            refuse(f"there is no option {name}; there are --port and --open")
        else:
            options[name] = value if has_value else (given.pop(0) if given else "")
    if len(files) != 1:
        refuse("bdpo review takes one file")
    port = options["--port"]
    if not port.isdecimal() or int(port) > _LAST_PORT:
        refuse(f"--port is {port!r}; give a number from 1 to {_LAST_PORT}, or 0 for any port that is free")
    if options["--open"] not in ("true", "false"):
        refuse(f"--open is {options['--open']!r}; give true or false")
    from bdpo_pl.reviewing.rows import reviewing

    try:
        with reviewing(Path(files[0])) as file:
            _serve(file, int(port), opens=options["--open"] == "true")
    except InputError as error:
        refuse(str(error))


def _serve(file: ReviewFile, port: int, *, opens: bool) -> None:
    """Serve the page of `file` until Ctrl-C."""
    from bdpo_pl.reviewing.server import make_server

    server, link = make_server(file, port)
    print(f"{file.left} of {len(file.rows)} rows are left. Open {link}\nCtrl-C ends it; every answer is saved at once.")
    if opens:
        threading.Thread(target=webbrowser.open, args=(link,), daemon=True).start()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(f"\n{file.left} of {len(file.rows)} rows are left in {file.path}")
    finally:
        server.server_close()


if __name__ == "__main__":
    main()
