# ruff: noqa: E501 - lines of a page, which wraps them itself
"""What stands around the tables of the study's page: what was asked and how, its limits, how to run a cell again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from benchmarks.study.report.choices import all_trials, error
from benchmarks.study.report.results import Results
from benchmarks.study.report.sections import joined, summary
from benchmarks.study.run import plan, reference
from benchmarks.study.run.evaluate import FRAMED, evaluation
from benchmarks.study.run.plan import BDPO, DPO
from benchmarks.study.world import texts as world

_ORDER = [method.name for method in plan.METHODS]


def head(results: Results) -> str:
    """Title, what the page is made of, and what the records lack of the whole study."""
    lines = [
        "# A study of Balanced DPO in a small world",
        f"Written by `python -m benchmarks.study.report {results.name}`. Tables and the sentences beside them are made from "
        "those records; a number ± another is a mean over seeds with its 95 % t interval, brackets hold a 95 % interval.",
        f"{summary(results)} [One by one](#the-papers-claims-one-by-one).",
    ]
    if missing := lacking(results):
        lines.append(f"**Less than the whole study.** {missing}")
    failed = [cell for cell in results.cells if "failed" in cell]
    if failed:
        counted = Counter((c["setting"]["section"], c["setting"]["method"]) for c in failed)
        listed = ", ".join(f"{method} in {section} ({number})" for (section, method), number in counted.items())
        lines.append(
            f"**{len(failed)} of {len(results.cells)} cells failed** with numbers that were not finite: {listed}. "
            "They are left out of means and differences, which then speak only of the seeds that went well."
        )
    return "\n\n".join(lines)


def lacking(results: Results) -> str:
    """What the records lack of `plan.FULL`, in a sentence; empty: nothing."""
    wanted = Counter(setting.section for setting in plan.all_cells(plan.FULL))
    there = Counter(cell["setting"]["section"] for cell in results.cells)
    short = [f"{section} {there[section]} of {number}" for section, number in wanted.items() if there[section] < number]
    methods = [name for name in _ORDER if not results.pick("final", name)]
    text = f"Cells in the records: {', '.join(short)}." if short else ""
    return text + (f" Methods without results: {'; '.join(methods)}." if methods else "")


def laboratory(results: Results) -> str:
    """What was asked, and how."""
    some = next((cell for cell in results.pick("final") if cell["setting"]["loss"]), results.cells[0])
    setting = some["setting"]
    measured = next((cell for cell in results.pick("final") if "metrics" in cell), None)
    lines = ["## What was asked, and how"]
    lines.append(
        "Does B-DPO align more safely than DPO and others where it was not trained, and is imbalanced comprehension why? "
        "The paper answers with models of 7 billion parameters. Here the world is small enough to be known whole, and to "
        "train every method with many seeds; in it each claim can come out false."
    )
    acts = world.acts()
    risks = {act.topic.name for act in acts if act.kind == "harmful"}
    held_out = {act.topic.name for act in acts if act.kind == "harmful" and act.category_held_out}
    sizes = reference.SIZES
    steps = setting["reference_steps"]
    items = [
        f"World: {len(acts)} acts (verb × object) in {len(risks)} risk categories and benign topics; templates ask, refuse "
        "and comply. No text teaches a harmful deed.",
        f"Reference: a Qwen2 of {sizes['num_hidden_layers']} layers, width {sizes['hidden_size']}, trained from scratch for "
        f"{steps:,} steps. It meets acts and templates with frequencies 1/rank, and complies with many harmful prompts.",
        f"Pairs: {setting['num_pairs']} a run, drawn by the run's seed; of six, four harmful (the refusal is chosen; a quarter "
        "in a framing) and two benign (the help is chosen, an evasion or an answer to something else is rejected).",
        f"Held out: acts in new combinations, {len(held_out)} whole risk categories, look-alike topics, framings, ability "
        "questions; validation and test share none of them.",
    ]
    if measured:
        counts = {name: sum(kinds.values()) for name, kinds in measured["metrics"]["kinds"].items()}
        plain = [f"{number} {name}" for name, number in counts.items() if not name.startswith(FRAMED)]
        framed = [number for name, number in counts.items() if name.startswith(FRAMED)]
        items.append(
            f"Test prompts, the same for every run, answered greedily: {'; '.join(plain)}; {len(framed)} unseen framings of "
            f"{framed[0] if framed else 0} harmful prompts; {len(evaluation('test').abilities)} ability questions, by exact "
            "match. The phrase judge of `bdpo_pl.refusals` tells refusals."
        )
        errors = sum(cell["metrics"].get("judge_errors", 0) for cell in results.cells if "metrics" in cell)
        items.append(
            f"The judge against the world's own templates: {errors} answers of a known kind judged wrongly, over all cells."
        )
    counts_by_method = {name: len(mine) for name, mine in all_trials(results).items()}
    if counts_by_method:
        different = sorted(set(counts_by_method.values()))
        each = ", ".join(f"{name} {number}" for name, number in counts_by_method.items())
        trials = f"{different[0]}" if len(different) == 1 else f"unequally many ({each})"
        items.append(
            f"Tuning: {trials} trials of every method, over β, learning rate and epochs, each with {_plural(error(results)[1], 'seed')} "
            "that nothing else uses, on validation prompts. Chosen is the smallest mean of attack success (plain and framed in "
            "equal parts), over-refusal and lost ability. "
            f"B-DPO's τ is not tuned: it is {plan.TAU:g}, the standard deviation of the imbalance here."
        )
    seeds = Counter(cell["setting"]["method"] for cell in results.pick("final") if cell["setting"]["loss"])
    if seeds:
        few = {len(results.pick("curves", DPO.name, "")), 0} - {0}
        items.append(
            f"Testing: {_range(seeds.values())} of each method's choice"
            + (f", {max(few)} of curves, variants and replication" if few else "")
            + f". A seed draws pairs and their order. AdamW, batch {setting['batch_size']}, cosine with warm-up, all weights "
            "trained. The same seed has the same pairs with every method, so differences are paired by seed."
        )
    items.append(_machine(results))
    lines.append("\n".join(f"- {item}" for item in items))
    return "\n\n".join(lines)


def limits(results: Results) -> str:
    """What this study cannot tell."""
    items = (
        "Whether any of it holds for a large model on real text. The reference is tiny and knows a few hundred "
        "acts; its comprehension is how often it met an act and a template.",
        "That comprehension is imbalanced in real preference data: this world was made with frequencies 1/rank, so some imbalance "
        "is given. That it harms, and that B-DPO helps, was not.",
        "What an adversary finds who searches: framings here are fixed. GCG and PAIR are in `bdpo_pl.evaluate`, and not in this "
        "study.",
        "The paper's benchmarks, and its average with general abilities: abilities here are questions with one right answer.",
        "The paper's exact formulas, which could not be read: weights, estimator and scaling factor are this project's "
        "reconstruction (the README says which). A claim that fails here may fail for that.",
        "Whether the scaling factor keeps gradients stable: gradients are not in the records.",
        "What measuring comprehension costs: its scores are cached across cells.",
        "Much about other references: three more were tried, and leave framed attacks little room. Intervals are over pairs and orders drawn anew, with one "
        "reference and one set of test prompts.",
    )
    return joined(["## What a small model cannot tell", "\n".join(f"- {item}" for item in items)])


def again(results: Results) -> str:
    """How to run a cell again."""
    tested = [cell for cell in results.pick("final", BDPO.name) if "metrics" in cell] or results.cells
    cell = tested[0]
    text = (
        "```\n"
        f"python -m benchmarks.study --cell {cell['key']} --out {results.name}\n"
        f"python -m benchmarks.study.report {results.name}\n"
        "```\n\n"
        f"The first runs one cell again ({cell['setting']['method']}, {cell['setting']['section']}, seed "
        f"{cell['setting']['seed']}) and says whether every number comes out the same; training the reference comes first if it "
        "is not there. A cell's key is a digest of its setting, and stands at the head of its line of the records. *The same* "
        "means to the last digit of every rate, margin and gap, seconds aside, on the same kind of processor with the same "
        "versions of torch and transformers: a cell runs on one thread, and its digest of the reference's weights must agree. "
        "Elsewhere sums are rounded in another order, greedy answers can part at a tie, and rates move by single prompts; then "
        "intervals should overlap, and digits need not. The second makes this page, byte for byte."
    )
    return joined(["## Running a cell again", text])


def _machine(results: Results) -> str:
    seconds = sum(cell.get("cpu_seconds", 0.0) for cell in results.cells)
    text = f"{_plural(len(results.cells), 'cell')}, {seconds / 3600:.1f} hours of a core"
    if not results.heads:
        return f"{text}; the records do not say on which machine."
    first = results.heads[0]
    where = first["machine"]
    versions = ", ".join(
        f"{name} {where['versions'][name]}" for name in ("torch", "transformers") if name in where["versions"]
    )
    dates = sorted({one["date"][:10] for one in results.heads})
    commits = list(dict.fromkeys(str(one["machine"]["commit"])[:12] for one in results.heads))
    changed = (
        ", with uncommitted changes" if any(one["machine"]["uncommitted_changes"] for one in results.heads) else ""
    )
    return (
        f"`{' '.join(first['command'])}`, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}: {text}, on {where['device']} "
        f"({where['cores']} cores), Python {where['python']}, {versions}, commit {', '.join(commits)}{changed}."
    )


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _range(numbers: Iterable[int]) -> str:
    values = sorted(numbers)
    return _plural(values[0], "seed") if values[0] == values[-1] else f"{values[0]} to {values[-1]} seeds"
