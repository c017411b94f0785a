"""Random option lines: parsed, or refused with a status; never a traceback."""

import json

from bdpo_pl.cli import known
from bdpo_pl.cli.command import run_command
from bdpo_pl.cli.diagnosing import DiagnoseCLI
from bdpo_pl.cli.job import FitCLI, parse_options
from bdpo_pl.cli.quick import answer_early
from bdpo_pl.cli.ranges import check_ranges
from bdpo_pl.evaluation.options import parse

BATCH, SECONDS = 10, 10

_VALUES = (
    "-1", "0", "1", "2", "7", "0.5", "-0.5", "1e-6", "1e30", ".nan", ".inf", "1" + "0" * 25, "true", "false",
    "null", "", "some", "a b", "ü", "[]", "{}", "[1]", "[a, b]", "{a: 1}", "{class_path: nowhere.Class}", "embedded",
    "auto", "none", "torch.optim.SGD", "SimPOLoss", "/nowhere", "../x",
    "cpu", "bf16-mixed", "ddp", "fsdp2", "@x", "---", "[", "{", "*",
)  # fmt: skip
# Help and the printing of a configuration end the process as they should.
_LEAVE_OUT = ("help", "print_config", "config")


def draw(rng):
    command = rng.choice(["fit", "diagnose", "evaluate"])
    names = [name for name in known.read()[command]["options"] if not name.rstrip("+").endswith(_LEAVE_OUT)]
    return {
        "command": command,
        "options": [f"--{rng.choice(names)}={rng.choice(_VALUES)}" for _ in range(rng.randrange(1, 5))],
    }


def check(case, folder):
    args = case["options"]
    if case["command"] != "evaluate":
        args = ["--model.policy=nowhere", "--data.train=nowhere.jsonl", "--trainer.accelerator=cpu", *args]
    cli = {"fit": FitCLI, "diagnose": DiagnoseCLI}.get(case["command"])

    def parsed():
        given = answer_early(case["command"], args)
        if cli is None:
            parse(given, None, check_ranges)
        else:
            parse_options(cli, given, None)

    try:
        run_command(parsed)
    except SystemExit as ended:
        return None if ended.code in (0, 2) else f"status {ended.code}: {json.dumps(args)}"
    return None


def smaller(case):
    options = case["options"]
    for i in range(len(options)):
        if len(options) > 1:
            yield {**case, "options": options[:i] + options[i + 1 :]}
