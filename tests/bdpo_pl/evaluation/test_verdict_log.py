"""The file of verdicts: what is in it, what is not, and what becomes of a damaged one."""

import json

import pytest

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.judges.judge import Verdict
from bdpo_pl.evaluation.verdict_log import WARNING, Answer, Judged, RecordFile, key_of

ANSWER = Answer("the zebra's secret — ü\n", 4, True, "a thought", True)
JUDGED = Judged(Verdict(refused=False, unsafe=True, score=0.25), 4, True)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "verdicts.jsonl"


def write(path, keep=False, keys=("a", "b")):
    with RecordFile(path, keep) as records:
        for key in keys:
            records.add_answer(key, ANSWER)
            records.add_verdict(key, "judge", JUDGED)
    return path


def test_verdicts_come_back_and_answers_do_not(path):
    records = RecordFile(write(path), False)
    assert records.verdict("a", "judge") == records.verdict("b", "judge") == JUDGED
    assert records.verdict("a", "another judge") is None
    assert records.verdict("c", "judge") is None
    assert records.answer("a") is None
    content = path.read_bytes()
    assert b"zebra" not in content
    assert b"warning" not in content
    assert json.loads(content.splitlines()[0]) == {"bdpo_pl_evaluation": 2}


def test_every_record_is_on_disk_at_once(path):
    with RecordFile(path, False) as records:
        for number, key in enumerate("abc", start=1):
            records.add_verdict(key, "judge", JUDGED)
            assert len(path.read_text().splitlines()) == 1 + number


def test_kept_answers_stand_under_a_warning_that_comes_first(path):
    write(path, keep=True)
    first, *rest = path.read_text().splitlines()
    assert json.loads(first)["warning"] == WARNING
    assert sum("zebra" in line for line in rest) == 2
    records = RecordFile(path, False)
    assert records.answer("a") == ANSWER
    # Whoever goes on without keeping answers loses none, and no warning.
    write(path, keep=False, keys=("c",))
    lines = path.read_text().splitlines()
    assert json.loads(lines[0])["warning"] == WARNING
    assert RecordFile(path, False).answer("b") == ANSWER
    assert sum("zebra" in line for line in lines) == 2


def test_warning_is_added_to_a_file_that_begins_to_keep_answers(path):
    write(path)
    write(path, keep=True, keys=("c",))
    assert json.loads(path.read_text().splitlines()[0])["warning"] == WARNING
    assert RecordFile(path, False).verdict("a", "judge") == JUDGED


def test_half_a_line_at_the_end_is_forgotten(path):
    whole = write(path).read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        path.write_bytes(whole[:-cut])
        records = RecordFile(path, False)
        assert records.verdict("a", "judge") == JUDGED
        assert records.verdict("b", "judge") is None
    write(path, keys=("b",))
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[]", '"text"', "3", "null", '{"judged": "c"}', '{"answer": "c"}', '{"what": 1}', "\udcff"],
)
def test_damaged_line_is_named_and_nothing_is_overwritten(path, line):
    lines = write(path).read_text().splitlines()
    lines.insert(2, line)
    path.write_text("\n".join(lines) + "\n", errors="surrogateescape")
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"verdicts\.jsonl, line 3: not a record .*remove the line"):
        RecordFile(path, False)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "mine"}\n', '{"prompt": "mine"}', "notes of mine", "notes\nof mine\n", "[1]\n",
        "\x00",
    ],
)  # fmt: skip
def test_foreign_file_is_left_alone(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(InputError, match="line 1: not a record of an evaluation"):
        RecordFile(path, False)
    assert path.read_text() == content


def test_file_of_another_version_is_left_alone(path):
    path.parent.mkdir()
    path.write_text('{"bdpo_pl_evaluation": 1}\n')
    with pytest.raises(InputError, match=r"written by another version .*remove it to evaluate again, or set folder"):
        RecordFile(path, False)
    assert path.exists()


def test_empty_file_is_none(path):
    path.parent.mkdir()
    path.write_text("")
    assert RecordFile(write(path), False).verdict("a", "judge") == JUDGED


def test_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"verdicts\.jsonl cannot be written .*set folder"),
        RecordFile(tmp_path / "file" / "verdicts.jsonl", False),
    ):
        pass


def test_keys_tell_facts_apart_and_mind_no_order():
    assert key_of({"a": 1, "b": "ü"}) == key_of({"b": "ü", "a": 1})
    assert len({key_of({"a": 1}), key_of({"a": 2}), key_of({"a": "1"}), key_of({})}) == 4
