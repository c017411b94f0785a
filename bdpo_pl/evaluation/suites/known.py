"""Suites by name, from a file or from a hub dataset.

On the command line a suite is `NAME`, a known suite; `NAME=SOURCE`, the same suite from a file or hub dataset of yours;
or `NAME:KIND=SOURCE`, a suite of your own, with KIND harmful or benign. Configurations can set all of `SuiteOptions`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from bdpo_pl import embedded
from bdpo_pl.data.sources import Record, read_records
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.suites.layouts import Layout, LayoutName, UnusableRowError, choose_layout, rename
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Kind, Suite, spread

_SPEC = re.compile(r"(?P<name>[^=:]+)(?::(?P<kind>[^=:]+))?(?:=(?P<source>.+))?", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass
class SuiteOptions:
    """A suite: prompts that are counted together.

    Args:
        name: name of a known suite, or of one of your own: letters, digits, `_`, `.` and `-`.
        file: CSV, JSONL, JSON, Parquet or text file, gzipped or not, or hub dataset; None: the source of the known
            suite of that name.
        kind: `harmful` or `benign`; required if neither the name nor the columns determine it.
        layout: layout of the file; None: determined by its columns.
        subset: configuration of a hub dataset that has several.
        split: split of a hub dataset. Default: `train`, or the known suite's.
        revision: git revision of a hub dataset; pin it to make a run repeatable.
        columns: mapping from our column names to yours, such as `{prompt: question}`.
    """

    name: str
    file: str | None = None
    kind: Kind | None = None
    layout: LayoutName | None = None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class KnownSuite:
    """A suite that can be named without a source.

    Attributes:
        kind: kind of the prompts.
        source: file or hub dataset.
        about: description for lists of suites.
        layout: layout of the file; None: determined by its columns.
        subset: configuration of the hub dataset.
        split: split of the hub dataset.
        gated: true if the hub requires a login, and consent to terms.
    """

    kind: Kind
    source: str
    about: str
    layout: LayoutName | None = None
    subset: str | None = None
    split: str = "train"
    gated: bool = False


_EMBEDDED = {
    "embedded_harmful": KnownSuite("harmful", str(embedded.HARMFUL_PROMPTS_FILE), "harmful requests, part of bdpo_pl"),
    "embedded_jailbreak": KnownSuite(
        "harmful",
        str(embedded.JAILBREAK_PROMPTS_FILE),
        "similar requests in framings that are never trained on, part of bdpo_pl",
    ),
    "embedded_benign": KnownSuite(
        "benign", str(embedded.BENIGN_PROMPTS_FILE), "benign requests that look harmful, part of bdpo_pl"
    ),
}
_PUBLISHED = {
    "strongreject": KnownSuite(
        "harmful", "walledai/StrongREJECT", "StrongREJECT (arXiv:2402.10260), 313 requests", gated=True
    ),
    "xstest_benign": KnownSuite("benign", "Paul/XSTest", "XSTest (arXiv:2308.01263), its 250 safe prompts", "xstest"),
    "xstest_harmful": KnownSuite("harmful", "Paul/XSTest", "XSTest, its 200 unsafe contrasts", "xstest"),
    "harmbench": KnownSuite(
        "harmful",
        "walledai/HarmBench",
        "HarmBench (arXiv:2402.04249), standard behaviours",
        None,
        "standard",
        gated=True,
    ),
    "jailbreakbench_harmful": KnownSuite(
        "harmful",
        "JailbreakBench/JBB-Behaviors",
        "JailbreakBench (arXiv:2404.01318), 100 misuses",
        "jailbreakbench",
        "behaviors",
        "harmful",
    ),
    "jailbreakbench_benign": KnownSuite(
        "benign",
        "JailbreakBench/JBB-Behaviors",
        "JailbreakBench, 100 benign counterparts",
        "jailbreakbench",
        "behaviors",
        "benign",
    ),
    "advbench": KnownSuite("harmful", "walledai/AdvBench", "AdvBench (arXiv:2307.15043), 520 requests", gated=True),
}


def known_suites() -> Mapping[str, KnownSuite]:
    """Return every suite that can be named without a source."""
    return _EMBEDDED | _PUBLISHED


def parse_suite(text: str) -> SuiteOptions:
    """Parse `NAME`, `NAME=SOURCE` or `NAME:KIND=SOURCE` into options.

    Raises:
        InputError: the text has none of these forms.
    """
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        raise InputError(f"suite {text!r}: give NAME, NAME=SOURCE or NAME:KIND=SOURCE, KIND being harmful or benign")
    return SuiteOptions(match["name"].strip(), match["source"], match["kind"])  # type: ignore[arg-type]


def split_suites(text: str) -> list[str | SuiteOptions]:
    """Split `NAME,NAME=FILE,…` into suites."""
    return list(text.split(","))


def load_suite(spec: str | SuiteOptions, max_prompts: int | None = None) -> Suite:
    """Load the suite that `spec` names.

    Duplicate texts are left out. Prompts that are left out are counted in `Suite.dropped`.

    Args:
        spec: options, or their short form (see the module).
        max_prompts: maximum number of prompts, evenly spread over the file, because most files are sorted by category.

    Raises:
        InputError: there is no such suite, file or dataset; the columns match no layout; the kind cannot be determined;
            a prompt is empty; or there are no prompts.
    """
    options = parse_suite(spec) if isinstance(spec, str) else spec
    if not _NAME.fullmatch(options.name):
        raise InputError(f"suite {options.name!r}: a name may have letters, digits, '_', '.' and '-' only")
    if options.kind is not None and options.kind not in get_args(Kind):
        raise InputError(f"suite {options.name}: kind must be harmful or benign, not {options.kind!r}")
    if max_prompts is not None and max_prompts < 1:
        raise InputError(f"max_prompts must be at least 1, got {max_prompts}")
    known = known_suites().get(options.name)
    if known is None and options.file is None:
        raise InputError(
            f"there is no suite {options.name!r}; known are {', '.join(known_suites())}. For one of your own write "
            f"{options.name}:harmful=FILE or {options.name}:benign=FILE"
        )
    if known is not None and options.kind not in (None, known.kind):
        raise InputError(f"suite {options.name} is of {known.kind} prompts, not {options.kind}; give it another name")
    prompts, kind, dropped, source = _read(options, known)
    if max_prompts is not None and len(prompts) > max_prompts:
        dropped["beyond max_prompts"] = len(prompts) - max_prompts
        prompts = spread(prompts, max_prompts)
    return Suite(options.name, kind, prompts, source, dict(dropped))


def _read(
    options: SuiteOptions, known: KnownSuite | None
) -> tuple[Sequence[EvaluationPrompt], Kind, Counter[str], str]:
    source = options.file or (known.source if known else "")
    # The split and subset of a known suite belong to its own source, not to one that the user names.
    own = known if known is not None and source == known.source else None
    split = options.split or (own.split if own else "train")
    subset = options.subset or (own.subset if own else None)
    records = read_records(source, split, options.revision, subset)
    try:
        first = next(records, None)
    except InputError as error:
        raise InputError(f"suite {options.name}: {error}{_remedy(source, options.name, own)}") from error
    if first is None:
        raise InputError(f"suite {options.name}: {source} has no rows")
    layout = _layout(rename(first, options.columns), options, known, is_own=own is not None)
    kind = options.kind or (known.kind if known else layout.kind)
    if kind is None:
        raise InputError(
            f"suite {options.name}: the {layout.name} layout of {source} does not determine the kind of its prompts; "
            f"write {options.name}:harmful={source} or {options.name}:benign={source}"
        )
    prompts: dict[str, EvaluationPrompt] = {}
    dropped: Counter[str] = Counter()
    for record in (first, *records):
        try:
            prompt = layout.parse(rename(record, options.columns), kind)
        except UnusableRowError as reason:
            dropped[str(reason)] += 1
            continue
        if prompt.text in prompts:
            dropped["the same text again"] += 1
        else:
            prompts[prompt.text] = prompt
    if not prompts:
        reasons = "; ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise InputError(
            f"suite {options.name}: no prompts are left of {source} ({reasons}); give another file, or say its `layout`"
        )
    return list(prompts.values()), kind, dropped, _place(source, split, subset, options.revision)


def _layout(first: Record, options: SuiteOptions, known: KnownSuite | None, *, is_own: bool) -> Layout:
    """Return the layout of a suite's file, given its first row; `is_own`: it is the known suite's own source."""
    if options.layout or known is None:
        return choose_layout(first, options.layout)
    if known.layout != "xstest":
        return choose_layout(first, known.layout if is_own else None)
    # A file of the user's may be in any layout that tells the kind, but that of XSTest has prompts of both kinds.
    if not {"type", "label"} & first.fields.keys():
        raise InputError(
            f"suite {options.name}: {first.source} has no column 'type' or 'label', which tell XSTest's safe prompts "
            f"from its unsafe ones; if all of them are {known.kind}, give the suite a name of your own, as in "
            f"mine:{known.kind}={first.source}"
        )
    return choose_layout(first, "xstest")


def _remedy(source: str, name: str, known: KnownSuite | None) -> str:
    if known is None:
        return ""
    login = (
        f" It is gated: accept its terms on https://huggingface.co/datasets/{source}, and log in with `hf auth login`."
        if known.gated
        else ""
    )
    return f".{login} With no way to the hub, fetch the published file elsewhere and write {name}=FILE"


def _place(source: str, split: str, subset: str | None, revision: str | None) -> str:
    if Path(source).expanduser().exists():
        return source
    return " ".join([source, *filter(None, (subset, split, revision and f"at {revision}"))])
