"""Two results side by side: what is a regression, and what is noise."""

import json
import sys

import pytest

from benchmarks.kernels.__main__ import main
from benchmarks.kernels.against import changes, markdown, read, remarks

MB = 1 << 20


def report(device="a CPU", **rows):
    """A result with rows (times, extra MB) of contenders at one shape."""
    return {
        "machine": {"device": device, "cores": 2},
        "rows": [
            {"task": "linear", "shape": "s", "contender": name, "time_s": sorted(times)[len(times) // 2],
             "times_s": times, "extra_bytes": extra * MB}
            for name, (times, extra) in rows.items()
        ],
    }  # fmt: skip


OLD = report(naive=([1.0, 1.0], 300), ours=([0.5, 0.5], 60))


def verdict(new):
    return {one.contender: one.verdict for one in changes(OLD, new)}


def test_a_result_has_not_changed_against_itself():
    assert verdict(OLD) == {"naive": "", "ours": ""}


def test_slower_beyond_noise_is_flagged():
    assert verdict(report(naive=([1.0, 1.0], 300), ours=([0.6, 0.6], 60)))["ours"] == "SLOWER"


def test_slower_within_noise_is_not():
    assert verdict(report(naive=([1.0, 1.0], 300), ours=([0.45, 0.6, 0.75], 60)))["ours"] == ""


def test_a_slower_machine_cancels_out():
    assert verdict(report(naive=([2.0, 2.0], 300), ours=([1.0, 1.0], 60))) == {"naive": "SLOWER", "ours": ""}


def test_larger_is_flagged_and_a_few_megabytes_are_not():
    assert verdict(report(naive=([1.0, 1.0], 300), ours=([0.5, 0.5], 80)))["ours"] == "LARGER"
    assert verdict(report(naive=([1.0, 1.0], 300), ours=([0.5, 0.5], 66)))["ours"] == ""


def test_what_only_one_result_has_is_left_out():
    new = report(naive=([1.0, 1.0], 300), other=([1.0], 1))
    new["rows"].append({"task": "linear", "shape": "s", "contender": "ours", "not_run": "out of memory"})
    assert list(verdict(new)) == ["naive"]


def test_another_machine_is_remarked_on_and_the_table_says_what_changed():
    assert remarks(OLD, OLD) == []
    (remark,) = remarks(OLD, report("another CPU"))
    assert "Another machine: device a CPU before, another CPU now" in remark
    table = markdown(changes(OLD, report(naive=([1.0, 1.0], 300), ours=([0.6, 0.6], 80))))
    assert "| linear | s | ours | 1.20 | ± 0.00 | 60 → 80 | SLOWER, LARGER |" in table


@pytest.mark.parametrize(("text", "message"), [(None, "No such file"), ("[", "Expecting value"), ("{}", "no `rows`")])
def test_a_file_that_is_no_result_is_refused(tmp_path, text, message):
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        read(path)


def test_the_command_fails_on_a_regression_alone(tmp_path, monkeypatch, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(OLD))
    monkeypatch.setattr(sys, "argv", ["kernels", "--against", str(old), "--load", str(new)])
    new.write_text(json.dumps(OLD))
    main()
    new.write_text(json.dumps(report(naive=([1.0, 1.0], 300), ours=([0.6, 0.6], 60))))
    with pytest.raises(SystemExit, match="1 of 2 are slower or larger than before") as stopped:
        main()
    # Python prints a text, and exits with status 1.
    assert isinstance(stopped.value.code, str)
    assert "SLOWER" in capsys.readouterr().out


def test_committed_results_can_be_read_and_compared_with_themselves():
    from benchmarks.kernels.__main__ import _RESULTS

    path = _RESULTS / "2026-11-24-cpu-kernels.json"
    found = changes(read(path), json.loads(path.read_text()))
    assert found
    assert not any(one.slower or one.larger for one in found)
