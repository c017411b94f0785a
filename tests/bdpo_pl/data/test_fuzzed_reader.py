"""Whatever a data file holds, reading it gives pairs or an InputError that names the file, and nothing else."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from makers import build_tokenizer, preference_rows, safe_rlhf_row

from bdpo_pl.data.loading import LoadOptions, load_pairs
from bdpo_pl.data.schemas.safe_rlhf import REQUIRED_COLUMNS
from bdpo_pl.data.sources import read_records
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.errors import InputError

TOKENIZER = PairTokenizer(build_tokenizer())
FUZZ = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {}, optional={"role": st.sampled_from(["user", "assistant", "system"]) | JSON, "content": JSON}
    ),
    max_size=4,
)
ROWS = st.one_of(
    st.fixed_dictionaries(
        {}, optional={name: st.text(max_size=20) | MESSAGES | JSON for name in ("prompt", "chosen", "rejected")}
    ),
    st.fixed_dictionaries({}, optional=dict.fromkeys(REQUIRED_COLUMNS, JSON)),
    JSON,
)


def read(path, bad_rows):
    """Pairs, or the error's text; anything else escapes and fails the test."""
    try:
        table, report = load_pairs(
            "train", str(path), TOKENIZER, Truncation(64, "keep_end"), LoadOptions(bad_rows=bad_rows)
        )
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017 - either outcome is right
        return None
    assert len(table) == report.kept > 0
    for i in range(len(table)):
        pair = table[i]
        assert pair.prompt_ids
        assert pair.chosen_ids
        assert pair.rejected_ids
    return table


@FUZZ
@given(content=st.binary(max_size=300), bad_rows=st.sampled_from(["auto", "drop"]))
def test_any_bytes_as_jsonl(tmp_path, content, bad_rows):
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(content)
    read(path, bad_rows)


@FUZZ
@given(rows=st.lists(ROWS, max_size=4), bad_rows=st.sampled_from(["auto", "drop"]), good=st.booleans())
def test_any_json_as_rows(tmp_path, rows, bad_rows, good):
    path = tmp_path / "fuzz.jsonl"
    if good:
        # Behind a row that settles the schema, all that follows is taken for one of its kind.
        rows = [preference_rows(1)[0] if len(rows) % 2 else safe_rlhf_row("q", ["a", "b"], [True, False], 0), *rows]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    read(path, bad_rows)


@FUZZ
@given(data=st.data())
def test_a_damaged_parquet_file(tmp_path, data):
    path = tmp_path / "fuzz.parquet"
    pq.write_table(pa.Table.from_pylist(preference_rows(3)), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    read(path, "auto")


@FUZZ
@given(columns=st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", *REQUIRED_COLUMNS]),
    st.sampled_from([[1, 2], [None, "a"], [["a"], []], [{"role": "user"}, None], [b"\xff", b""], [1.5, float("nan")]]),
    max_size=8,
))  # fmt: skip
def test_any_types_as_parquet(tmp_path, columns):
    path = tmp_path / "fuzz.parquet"
    pq.write_table(pa.table(columns), path)
    read(path, "drop")


@pytest.mark.parametrize("file", ["../secret.arrow", "/etc/passwd", "..", "sub/../../secret.arrow"])
def test_a_saved_dataset_cannot_name_files_outside_its_folder(tmp_path, file):
    import datasets

    datasets.Dataset.from_list(preference_rows(3)).save_to_disk(str(tmp_path / "secret"))
    datasets.Dataset.from_list(preference_rows(2)).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "secret" / "data-00000-of-00001.arrow").rename(tmp_path / "secret.arrow")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_data_files"] = [{"filename": file}]
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="names a file outside the folder"):
        list(read_records(str(tmp_path / "saved")))


def test_a_damaged_saved_dataset_is_named(tmp_path):
    import datasets

    datasets.Dataset.from_list(preference_rows(3)).save_to_disk(str(tmp_path / "saved"))
    for name, content in (("data-00000-of-00001.arrow", b"nothing"), ("state.json", b"{"), ("state.json", b"[]")):
        (tmp_path / "saved" / name).write_bytes(content)
        with pytest.raises(InputError, match="saved"):
            list(read_records(str(tmp_path / "saved")))
