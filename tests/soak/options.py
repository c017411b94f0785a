"""Random option lines: parsed, or refused with a status; never a traceback."""

import json

from bdpo_pl.cli import evaluating, known
from bdpo_pl.cli.command import run_command
from bdpo_pl.cli.diagnosing import DiagnoseCLI
from bdpo_pl.cli.job import FitCLI, parse_options
from bdpo_pl.cli.quick import answer_early
from bdpo_pl.evaluation import options as evaluation

BATCH, SECONDS = 200, 10
GOAL = {"cases": 10_000}

_PARSERS = {}
_DEFAULTS = {}

_VALUES = (
    "-1", "0", "1", "2", "7", "0.5", "-0.5", "1e-6", "1e30", ".nan", ".inf", "1" + "0" * 25, "true", "false",
    "null", "", "some", "a b", "ü", "[]", "{}", "[1]", "[a, b]", "{a: 1}", "{class_path: nowhere.Class}", "embedded",
    "auto", "none", "torch.optim.SGD", "SimPOLoss", "/nowhere", "../x",
    "cpu", "bf16-mixed", "ddp", "fsdp2", "@x", "---", "[", "{", "*",
)  # fmt: skip
_FITTING = {bool: ("true", "false"), int: ("0", "1", "2", "7"), float: ("0", "1e-6", "0.5", "1", "2")}
_JOB = ("--model.policy=nowhere", "--data.train=nowhere.jsonl", "--trainer.accelerator=cpu")
# Help and the printing of a configuration end the process as they should.
_LEAVE_OUT = ("help", "print_config", "config")


def draw(rng):
    """Draw a command and some of its options, half of them with a value of the kind that the option has."""
    command = rng.choice(list(_DEFAULTS))
    names = [name for name in known.read()[command]["options"] if not name.rstrip("+").endswith(_LEAVE_OUT)]
    chosen = [rng.choice(names) for _ in range(rng.randrange(1, 5))]
    return {"command": command, "options": [f"--{name}={_value(rng, _DEFAULTS[command].get(name))}" for name in chosen]}


def _value(rng, default):
    fitting = _FITTING.get(type(default), _VALUES)
    return rng.choice(fitting if rng.random() < 0.5 else _VALUES)


def _keep_defaults(parser):
    defaults = parser.get_defaults()
    parser.get_defaults = lambda *_, **__: defaults.clone()


class _Kept:
    """A command line that builds its parser, and finds its defaults, which takes most of the time, only once."""

    def setup_parser(self, *args):
        if type(self) not in _PARSERS:
            super().setup_parser(*args)
            _PARSERS[type(self)] = self.parser
            _keep_defaults(self.parser)
        self.parser = _PARSERS[type(self)]


class _Fit(_Kept, FitCLI):
    pass


class _Diagnose(_Kept, DiagnoseCLI):
    pass


def prepare():
    """Build the parsers, before any process is forked."""
    for command, cli in (("fit", _Fit), ("diagnose", _Diagnose)):
        parse_options(cli, [*_JOB], None)
        _DEFAULTS[command] = vars(_PARSERS[cli].get_defaults().as_flat())
    kept = evaluation.EvaluationParser()
    evaluation.add_options(kept)
    _keep_defaults(kept)
    evaluation.EvaluationParser = lambda **_: kept
    evaluation.add_options = lambda _: None
    _DEFAULTS["evaluate"] = vars(kept.get_defaults().as_flat())


def check(case, folder, counts):
    args = case["options"]
    if case["command"] != "evaluate":
        args = [*_JOB, *args]
    cli = {"fit": _Fit, "diagnose": _Diagnose}.get(case["command"])

    def parsed():
        given = answer_early(case["command"], args)
        if cli is None:
            evaluating.parse_options(given, None)
        else:
            parse_options(cli, given, None)

    try:
        run_command(parsed)
    except SystemExit as ended:
        counts["refused" if ended.code == 2 else "ended with 0"] += 1
        return None if ended.code in (0, 2) else f"status {ended.code}: {json.dumps(args)}"
    counts["taken"] += 1
    return None


def smaller(case):
    options = case["options"]
    for i in range(len(options)):
        if len(options) > 1:
            yield {**case, "options": options[:i] + options[i + 1 :]}
