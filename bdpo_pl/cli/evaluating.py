"""The job of `bdpo_pl.evaluate`: generate answers, judge, compare, report."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import torch

from bdpo_pl.cli.misfits import check_nulls, refuse_misfit
from bdpo_pl.cli.ranges import check_ranges
from bdpo_pl.console import get_console, paths_table
from bdpo_pl.data.report import report_table
from bdpo_pl.embedded import EMBEDDED
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation import gates
from bdpo_pl.evaluation.answerers import GenerationOptions
from bdpo_pl.evaluation.answering import Asker
from bdpo_pl.evaluation.attacks.budget import Budget, BudgetOptions
from bdpo_pl.evaluation.attacks.choice import Attacks, choose_attacks
from bdpo_pl.evaluation.exported import check_export, write_answers
from bdpo_pl.evaluation.judges.judge import Judge
from bdpo_pl.evaluation.judges.phrases import PhraseJudge
from bdpo_pl.evaluation.labels import Labels
from bdpo_pl.evaluation.measures import ability
from bdpo_pl.evaluation.next_round import write_rows
from bdpo_pl.evaluation.options import EvaluateOptions, parse
from bdpo_pl.evaluation.page import build_page, findings
from bdpo_pl.evaluation.results import Evaluation, SuiteFacts, corrected
from bdpo_pl.evaluation.runner import Runner, check_labels, check_refine, fit_suites
from bdpo_pl.evaluation.subjects import ServedSubject, ServerOptions, Subject, newest_run, subject
from bdpo_pl.evaluation.suites.known import known_suites, load_suite
from bdpo_pl.evaluation.suites.suite import Suite
from bdpo_pl.evaluation.terminal import agreement_table, results_table, suites_table, weakness_table
from bdpo_pl.evaluation.verdict_log import RecordFile
from bdpo_pl.files import RunFolder, writable_file, writable_folder, write_whole
from bdpo_pl.models.precision import choose_devices, choose_dtype
from bdpo_pl.reporting.format import general, whole
from bdpo_pl.reporting.progress import progress
from bdpo_pl.reporting.terminal import findings_table

LIMIT_STATUS = 1
"""Exit status if a limit of `fail_if` is exceeded."""

OWN_SUITES = ("embedded_harmful", "embedded_jailbreak", "embedded_benign")


def parse_options(args: list[str], description: str | None) -> tuple[list[str], EvaluateOptions]:
    """Parse the command line, and return the models and the options.

    Raises:
        InputError: A number out of its range, `null` where an option has no such value, or options that do not fit.
    """

    def check(parsed: object) -> None:
        check_nulls(parsed, get_type_hints(EvaluateOptions))
        check_ranges(parsed)

    try:
        return parse(args, description, check)
    except ValueError as error:
        refuse_misfit(error)


def run(args: list[str], description: str | None) -> None:
    """Run the job that `args` describe; `description` is the first text of the help."""
    start = time.perf_counter()
    names, options = parse_options(args, description)
    if options.list_suites:
        get_console().print(suites_table(known_suites()))
        return
    notes = []
    if not names:
        names, options, note = _embedded_job(options)
        notes += note
    if options.suites is None:
        notes.append("The prompts are the small set of bdpo_pl itself; for a real model name published suites.")
    subjects = [
        subject(
            name,
            trust_remote_code=options.trust_remote_code,
            attn_implementation=options.attn_implementation,
            server=options.server,
        )
        for name in names
    ]
    check_labels(subjects)
    # All errors that can be detected are detected before the first model answers.
    refine = check_refine(options.refine)
    exported = check_export(options.export_answers)
    junit, summary = (writable_file(getattr(options, name), name) for name in ("junit", "summary"))
    limits = options.limits()
    ability.check(options.ability)
    folder = writable_folder(options.folder, "folder")
    bare = [load_suite(spec, options.max_prompts) for spec in options.suites or OWN_SUITES]
    _check_served(subjects, options)
    devices = choose_devices(options.device, options.devices)
    # Attacks start from the prompts that fit.
    bare = fit_suites(bare, subjects, options.generation)
    framed, attacks = choose_attacks(options.attacks, bare, options.max_prompts)
    _check_budget(options.budget, attacks)
    suites = [*bare, *fit_suites(framed, subjects, options.generation)]
    gates.check_names(limits, [suite.name for suite in suites], [one.label for one in subjects])
    with RunFolder(folder, "folder"):
        evaluation, runner = _evaluate(options, subjects, suites, attacks, folder, notes, devices)
        paths = _write(evaluation, runner, folder, options, refine, exported)
        outcomes = gates.judge_limits(limits, evaluation)
        seconds = time.perf_counter() - start
        if junit is not None:
            paths["limits as JUnit XML"] = junit
            gates.write_junit(outcomes, junit, seconds)
        if summary is not None:
            paths["summary"] = summary
            gates.write_summary(evaluation, outcomes, summary)
    _print(evaluation, runner, paths, seconds)
    if failed := [outcome for outcome in outcomes if outcome.failed]:
        for outcome in failed:
            get_console(stderr=True).print(
                f"limit: {outcome.limit.text}: {outcome.value:.4g}", style="bold red", markup=False, soft_wrap=True
            )
        sys.exit(LIMIT_STATUS)


def _check_served(subjects: list[Subject | ServedSubject], options: EvaluateOptions) -> None:
    """Raise `InputError` for options that need the weights of a model behind a server, or a model behind one."""
    for one in subjects:
        if isinstance(one, ServedSubject):
            # Reports a missing key, or an option that servers do not take, before another model answers.
            one.answerer(torch.float32, one.never, options.generation)
    served = [one.label for one in subjects if isinstance(one, ServedSubject)]
    if not served and options.server != ServerOptions():
        raise InputError("server is for models behind a server, and none is named: leave it out")
    if options.devices != 1 and len(served) == len(subjects):
        raise InputError(
            f"devices is {options.devices}, and no model is loaded here; leave it out, and write several servers of "
            "one model as label=http://a/v1,http://b/v1#NAME"
        )
    asked = [
        name
        for name, wanted in (
            ("pairs", bool(options.pairs.sources())),
            ("ability", options.ability.embedded or bool(options.ability.lm_eval)),
            ("attacks.gcg", options.attacks.gcg is not None),
            ("attacks.genetic", options.attacks.genetic is not None),
            ("attacks.prefill", options.attacks.prefill),
        )
        if wanted
    ]
    if served and asked:
        raise InputError(
            f"{', '.join(served)} is behind a server, which gives only answers: {', '.join(asked)} need a model that "
            "is loaded here; leave them out, or name a folder"
        )


def _check_budget(budget: BudgetOptions, attacks: Attacks) -> None:
    """Raise `InputError` for a budget that does not suffice for one step of every attack, or that limits nothing."""
    if attacks.suite is not None:
        for attack in attacks.chosen:
            attack.check(Budget.begin(budget, len(attacks.suite.prompts)))
    elif budget != BudgetOptions():
        raise InputError(
            "budget limits attacks that search (gcg, genetic, refinement, tree, more), but none is chosen: leave it out"
        )


def _write(
    evaluation: Evaluation,
    runner: Runner,
    folder: Path,
    options: EvaluateOptions,
    refine: Path | None,
    exported: Path | None,
) -> dict[str, Path]:
    """Write the results and return the path of each file by its kind."""
    paths = {"report": build_page(evaluation).write(folder / "report.html"), "numbers": folder / "evaluation.json"}
    write_whole(paths["numbers"], json.dumps(evaluation.to_json(), indent=2, ensure_ascii=False) + "\n")
    paths["answers, to handle with care" if options.keep_answers else "verdicts"] = runner.asker.records.path
    if exported is not None:
        exported = write_answers(runner.exported, evaluation.judge["judge"], exported)
        paths["answers to label, to handle with care"] = exported
    if refine is not None:
        refine = write_rows(evaluation.failures, refine)
        paths["rows to complete, to handle with care"] = refine
    return paths


def _embedded_job(options: EvaluateOptions) -> tuple[list[str], EvaluateOptions, list[str]]:
    """Return what is evaluated if no model is named: the embedded model, and the model that its newest run trained."""
    names, notes = [f"before={EMBEDDED}"], []
    newest = newest_run(Path("runs"))
    if newest is None:
        notes.append(
            "There is no run of the embedded model under runs yet; after `python -m bdpo_pl.fit`, the trained model is "
            "compared with it."
        )
    else:
        names.append(f"{newest.parent.name}={newest}")
    embedded_pairs = replace(options.pairs, train=EMBEDDED, held_out=EMBEDDED, out_of_distribution=EMBEDDED)
    return (
        names,
        replace(
            options,
            pairs=options.pairs if options.pairs.sources() else embedded_pairs,
            ability=replace(options.ability, embedded=True),
        ),
        notes,
    )


def _evaluate(
    options: EvaluateOptions,
    subjects: list[Subject | ServedSubject],
    suites: list[Suite],
    attacks: Attacks,
    folder: Path,
    notes: list[str],
    devices: list[torch.device],
) -> tuple[Evaluation, Runner]:
    judge = options.judge
    labels = Labels.read(options)
    keep_texts = options.show_texts or options.refine is not None or options.export_answers is not None
    with (
        RecordFile(folder / "verdicts.jsonl", options.keep_answers) as records,
        progress("prompts") as reporter,
    ):
        agreement = None if labels is None else labels.measure(judge, records)
        # What happened on the labelled answers says nothing of the models' answers.
        on_labels = Counter(judge.notes())
        # An attack first creates each of its prompts and then sends it.
        attacked = 2 * len(attacks.chosen) * len(attacks.suite.prompts) if attacks.suite is not None else 0
        total = (sum(len(suite.prompts) for suite in suites) + attacked) * len(subjects)
        task = reporter.add_task("", total=total)
        stage = ""

        def begin(text: str) -> None:
            nonlocal stage
            stage = text
            reporter.update(task, description=stage)

        def advance(count: int) -> None:
            reporter.update(task, description=", ".join(filter(None, (stage, _speed(asker)))))
            reporter.advance(task, count)

        asker = Asker(judge, records, options.generation, keep_texts, advance)
        runner = Runner(
            suites,
            asker,
            choose_dtype(options.dtype, devices[0]),
            devices[0],
            options.pairs,
            options.ability,
            attacks.chosen,
            attacks.suite,
            options.attacks.state_folder,
            keep_texts,
            begin,
            options.budget,
            devices[1:],
        )
        models = corrected([runner.evaluate(one) for one in subjects])
    return (
        Evaluation(
            facts=_facts(options, subjects, judge, runner),
            judge={"judge": judge.name, **judge.facts()},
            agreement=agreement,
            suites=[SuiteFacts(s.name, s.kind, s.source, len(s.prompts), s.digest, dict(s.dropped)) for s in suites],
            models=models,
            failures=runner.failures,
            notes=[*notes, *(() if labels is None else labels.notes()), *runner.notes],
            shows_texts=options.show_texts,
            over_refusal_judge={"judge": PhraseJudge.name, **PhraseJudge().facts()} if runner.by_phrases else {},
            judge_notes=Counter(judge.notes()) - on_labels,
        ),
        runner,
    )


def _facts(
    options: EvaluateOptions, subjects: list[Subject | ServedSubject], judge: Judge, runner: Runner
) -> dict[str, str]:
    generation, temperature = options.generation, _temperature(options.server, subjects)
    return {
        "models": ", ".join(f"{one.label}: {one.place}" for one in subjects),
        "judge": judge.name,
        "responses": f"greedy{' except behind servers' if temperature else ''}, "
        f"up to {generation.max_new_tokens} tokens, "
        + ("in the chat template" if generation.use_template else "without chat template"),
        **_varied(generation),
        **temperature,
        "weights": str(runner.dtype).removeprefix("torch."),
        "device": ", ".join(map(str, (runner.device, *runner.further))),
    }


def _varied(generation: GenerationOptions) -> dict[str, str]:
    """Return what else the responses depend on, if it is not as by default."""
    found = {}
    if generation.max_thought_tokens:
        found["thoughts"] = f"up to {generation.max_thought_tokens} tokens"
    if generation.chat_template_kwargs:
        found["chat template's variables"] = json.dumps(generation.chat_template_kwargs, sort_keys=True, default=str)
    return found


def _temperature(server: ServerOptions, subjects: list[Subject | ServedSubject]) -> dict[str, str]:
    """Return at which temperature servers answer, if that is not greedily."""
    if server.temperature == 0.0 or not any(isinstance(one, ServedSubject) for one in subjects):
        return {}
    return {"temperature of servers": "their own" if server.temperature is None else general(server.temperature, 3)}


def _speed(asker: Asker) -> str:
    """Return the speed of the generation; empty if nothing was generated, or its tokens are not known."""
    return f"{general(asker.tokens / asker.seconds, 3)} tokens/s" if asker.tokens else ""


def _print(evaluation: Evaluation, runner: Runner, paths: dict[str, Path], seconds: float) -> None:
    console = get_console()
    if runner.pair_reports:
        console.print(report_table(runner.pair_reports))
    console.print(results_table(evaluation))
    if evaluation.models[-1].weakest:
        console.print(weakness_table(evaluation))
    if evaluation.agreement is not None:
        console.print(agreement_table(evaluation))
    if found := list(findings(evaluation)):
        console.print(findings_table(found))
    console.print(paths_table(paths))
    asker = runner.asker
    speed = f"; {whole(asker.tokens)} tokens generated, {_speed(asker)}" if asker.tokens else ""
    console.print(f"Done in {seconds:.0f} s{speed}")
