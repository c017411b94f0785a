"""The report of a run, in a browser."""

from browser import Browser

from bdpo_pl.training.completions_file import Row
from bdpo_pl.training.run_report import read_curves, run_page

SAID = [("warning", "Only 3 held-out pairs."), ("note", "By definition."), ("notice", "No safety.")]


def page(curves, **options):
    rows = [["held-out preference accuracy", "3", "by definition", "66.7% [20.8, 93.9]"]]
    return run_page("SmolLM2, BalancedDPOLoss", {"optimiser": "AdamW"}, rows, SAID, curves, "cpu", 61.0, **options)


def completions():
    """Of a held-out set and of a suite, with words, lines and code that are longer than a narrow window."""
    wide = "x" * 300 + "\n" + "def f(): " + "return 1; " * 60 + "\n" + "<img src=http://example.invalid/a.png>"
    place = "/a/folder/with/a/rather/long/name/" + "pairs" * 20 + ".jsonl:17"
    held_out = [
        Row(step, "held_out", place, wide, f"{wide} {step}", 12, step > 0, chosen=wide, rejected="no")
        for step in range(0, 60, 3)
    ]
    return [*held_out, *(Row(step, "harmful", "h.csv:1", "p", f"no {step}", refused=step > 0) for step in (0, 57))]


def test_curves_are_read_by_step_and_gaps_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,epoch,train/loss,held_out/loss\n0,0,,0.69\n4,0,0.6,\n9,0,0.5,0.55\n")
    curves = read_curves(tmp_path / "metrics.csv")
    assert curves == {"train/loss": ([4.0, 9.0], [0.6, 0.5]), "held_out/loss": ([0.0, 9.0], [0.69, 0.55])}
    assert read_curves(tmp_path / "nowhere.csv") == {}


def test_a_run_too_short_for_a_line_says_so():
    assert "Too few steps" in page({"train/loss": ([1.0], [0.6])}).render()


def test_values_that_are_not_finite_are_counted_and_not_drawn(tmp_path):
    """Under 16-mixed the norm of a step that the scaler skips is infinite."""
    (tmp_path / "metrics.csv").write_text("step,train/grad_norm,train/lr\n0,inf,0.1\n1,2.5,0.2\n2,nan,0.3\n3,2.0,0.4\n")
    text = page(read_curves(tmp_path / "metrics.csv")).render()
    assert text.count("<figure") == 2
    assert text.count("Not drawn, because not finite: 2 values.") == 1
    alone = page({"train/grad_norm": ([0.0, 1.0], [float("inf"), 1.0])}).render()
    assert "Too few steps" in alone


def test_page_is_whole_at_any_width_in_light_and_dark(tmp_path):
    names = ("train/loss", "held_out/loss", "train_probe/margin", "held_out/margin", "gap/margin",
             "held_out/drift_chosen", "held_out/drift_rejected", "train/weight_chosen", "train/lr")  # fmt: skip
    curves = {name: ([0.0, 5.0, 10.0], [0.7, 0.5 + i / 50, 0.4]) for i, name in enumerate(names)}
    path = page(curves).write(tmp_path / "report.html")
    with Browser(tmp_path / "profile") as browser:
        for width in (1200, 420):
            for dark in (False, True):
                visit = browser.visit(path, width=width, dark=dark)
                assert (visit.complaints, visit.requests, visit.overflow, visit.nameless) == ([], [], 0, 0)
                assert (len(visit.drawings), visit.sideways) == (5, 0)
    assert "Only 3 held-out pairs." in visit.text


OPEN = "document.querySelectorAll('details').forEach(e => { e.open = true });"
HIDDEN = """
const wide = [...document.querySelectorAll('.scroll, details, pre')].filter(e => e.scrollWidth > e.clientWidth + 1);
if (wide.length) throw new Error(`${wide.length} parts are wider than the window, first ${wide[0].outerHTML}`);
"""


def test_page_with_completions_is_whole_at_any_width_folded_and_open(tmp_path):
    told = page({}, completions=completions(), shows_texts=True)
    path = told.write(tmp_path / "report.html")
    bare = page({}, completions=completions()).write(tmp_path / "bare.html")
    with Browser(tmp_path / "profile") as browser:
        for width in (1200, 420):
            for dark in (False, True):
                for script in (HIDDEN, OPEN + HIDDEN):
                    visit = browser.visit(path, width=width, dark=dark, script=script)
                    assert (visit.complaints, visit.requests, visit.overflow, visit.nameless) == ([], [], 0, 0)
                    # Texts are unfolded by the reader, and all of each is there.
                    assert ("policy after step 57, a refusal" in visit.text) == script.startswith(OPEN)
                    assert ("return 1; " * 60 in visit.text) == script.startswith(OPEN)
                visit = browser.visit(bare, width=width, dark=dark)
                assert (visit.complaints, visit.requests, visit.overflow, visit.nameless) == ([], [], 0, 0)
                assert "Texts are left out" in visit.text
    assert "Completions by optimiser step" in visit.text
    assert "Refused: the share of refusals" in visit.text
