"""The report of a run, in a browser."""

from browser import Browser

from bdpo_pl.training.run_report import read_curves, run_page

SAID = [("warning", "Only 3 held-out pairs."), ("note", "By definition."), ("notice", "No safety.")]


def page(curves):
    rows = [["held-out preference accuracy", "3", "by definition", "66.7% [20.8, 93.9]"]]
    return run_page("SmolLM2, BalancedDPOLoss", {"optimiser": "AdamW"}, rows, SAID, curves, "cpu", 61.0)


def test_curves_are_read_by_step_and_gaps_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,epoch,train/loss,held_out/loss\n0,0,,0.69\n4,0,0.6,\n9,0,0.5,0.55\n")
    curves = read_curves(tmp_path / "metrics.csv")
    assert curves == {"train/loss": ([4.0, 9.0], [0.6, 0.5]), "held_out/loss": ([0.0, 9.0], [0.69, 0.55])}
    assert read_curves(tmp_path / "nowhere.csv") == {}


def test_a_run_too_short_for_a_line_says_so():
    assert "Too few steps" in page({"train/loss": ([1.0], [0.6])}).render()


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
