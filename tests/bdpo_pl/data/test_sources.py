"""Files of every kind that is read, and everything that must not hang, crash or be left out in silence."""

import gzip
import json
import os
import socket

import pytest
from makers import build_tokenizer, preference_rows, write_jsonl

from bdpo_pl.data import files
from bdpo_pl.data.loading import load_pairs
from bdpo_pl.data.sources import read_records
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.errors import InputError

ROWS = preference_rows(4)


def fields(source):
    return [record.fields for record in read_records(str(source))]


def as_csv(rows):
    return "prompt,chosen,rejected\n" + "".join(f'"{r["prompt"]}","{r["chosen"]}","{r["rejected"]}"\n' for r in rows)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("rows.JSONL", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("rows.ndjson", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("rows.json", json.dumps(ROWS)),
        ("rows.json", json.dumps({"version": 1, "data": ROWS})),
        ("rows.csv", as_csv(ROWS)),
    ],
)
def test_same_rows_from_every_kind_of_file(tmp_path, name, content, packed):
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    assert fields(path) == ROWS
    place = next(read_records(str(path))).place
    assert place.endswith(("line 1", "row 0", "line 2"))


def test_text_file_is_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffhow do i water it ?\n\n  why ?  \n", encoding="utf-8")
    assert fields(path) == [{"prompt": "how do i water it ?"}, {"prompt": "why ?"}]


def test_rest_of_a_folder_is_said(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS[:2])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(json.dumps(r).encode() + b"\n" for r in ROWS[2:])))
    for name in ("README.md", "c.xlsx", ".hidden.jsonl"):
        (tmp_path / name).write_text("x")
    (tmp_path / "sub").mkdir()
    table, report = load_pairs("train", str(tmp_path), PairTokenizer(build_tokenizer()), Truncation(256))
    assert len(table) == 4
    assert set(report.files_left_out) == {"README.md", "c.xlsx", ".hidden.jsonl", "sub/"}
    assert report.notes["files in the folder that are not read"].startswith("4 (")


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    folder = os.getcwd()
    os.chdir(path.parent)  # a socket's path may be no longer than about a hundred signs
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(folder)


def make_loop(path):
    path.symlink_to(path.name)


def make_dangling(path):
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (make_fifo, "a named pipe"),
        (make_socket, "a socket"),
        (make_loop, "a link that leads nowhere or to itself"),
        (make_dangling, "a link that leads nowhere or to itself"),
        (lambda path: path.mkdir(), "a folder, though its name is a file's"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv", ".json.gz"])
def test_what_is_no_file_is_named_and_never_waited_for(tmp_path, make, named, suffix):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    make(tmp_path / f"b{suffix}")
    with pytest.raises(InputError, match=rf"b{suffix}: {named}"):
        fields(tmp_path)
    if make is not make_dangling and "folder" not in named:
        with pytest.raises(InputError, match=named):
            fields(tmp_path / f"b{suffix}")


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.jsonl", b'[{"prompt": 1}]\n', "a file that is one JSON array is read as .json"),
        ("a.json", b'{"prompt": "x"}\n{"prompt": "y"}\n', "belong into a .jsonl file"),
        ("a.json", b'"x"', "expected a JSON array of objects"),
        ("a.json", b"[1]", "row 0: expected a JSON object"),
        ("a.jsonl", b'{"chosen": "a", "chosen": "b"}\n', "line 1: the key 'chosen' is there twice"),
        ("a.json", b'[{"chosen": "a", "chosen": "b"}]', "the key 'chosen' is twice in one object"),
        ("a.jsonl.gz", b"not gzip", "not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 5000, mtime=0)[:60], "not a whole gzip file"),
        ("a.csv", b"a,b\n1\n", "line 2: 1 fields under 2 columns"),
        ("a.csv", b"a,a\n1,2\n", "two columns of the same name"),
        ("a.csv", b"a\n\xff\n", "line 2: not UTF-8"),
        ("a.txt", b"\xff\n", "line 1: not UTF-8"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "not a whole Parquet file"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, fault):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        fields(tmp_path / name)
    assert fault in str(error.value)
    assert name in str(error.value)


def test_huge_line_is_refused_before_it_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE", 1000)
    for name in ("a.jsonl", "a.csv", "a.txt", "a.jsonl.gz"):
        content = b'{"prompt": "' + b"x" * 5000 + b'"}\n'
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        with pytest.raises(InputError, match=rf"{name}, line 1: longer than"):
            fields(tmp_path / name)


def test_huge_text_is_refused_before_it_is_tokenised(tmp_path):
    rows = [*ROWS, {"prompt": "x" * 5_000_000, "chosen": "so .", "rejected": "no ."}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    tokenizer = PairTokenizer(build_tokenizer())
    with pytest.raises(InputError, match=r"line 5: field 'prompt' holds a text of 5,000,000 characters"):
        load_pairs("train", str(path), tokenizer, Truncation(256))


@pytest.mark.parametrize(("name", "place"), [("a.jsonl", "line 2"), ("a.json", "row 1")])
def test_a_number_of_too_many_digits_is_named_with_its_row(tmp_path, name, place):
    rows = ['{"prompt": "a"}', f'{{"prompt": "b", "x": [{{"y": {"1" * 5000}}}]}}']
    path = tmp_path / name
    path.write_text("\n".join(rows) if name == "a.jsonl" else f"[{', '.join(rows)}]")
    with pytest.raises(InputError, match=rf"{name}, {place}: a whole number has more digits"):
        list(read_records(str(path)))


@pytest.mark.parametrize(
    ("content", "place"), [("1" * 5000, 0), (f'[{{"x": -{"1" * 4300}}}, {{"x": {"1" * 4301}}}]', 1)]
)
def test_numbers_of_too_many_digits_are_told_from_the_largest_and_from_rows(tmp_path, content, place):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=rf"a\.json, row {place}: a whole number has more digits"):
        list(read_records(str(tmp_path / "a.json")))
