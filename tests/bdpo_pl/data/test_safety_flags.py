"""Whether responses are safe: from columns to the loss, and what SafeDPO has done with it."""

import re

import pytest
import torch
from makers import build_tokenizer, preference_rows, safe_rlhf_row, write_jsonl
from training import fit

from bdpo_pl import embedded
from bdpo_pl.data.batches import PairDataset
from bdpo_pl.data.loading import LoadOptions, load_pairs
from bdpo_pl.data.schemas.safe_rlhf import SafeRLHFOptions
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.errors import InputError
from bdpo_pl.losses import SafeDPOLoss

FLAGS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.fixture
def load(tmp_path):
    """(table, report) of rows."""

    def loaded(rows, by_safety=True, **options):
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        tokenizer = PairTokenizer(build_tokenizer())
        return load_pairs("train", str(path), tokenizer, Truncation(128), LoadOptions(**options), by_safety=by_safety)

    return loaded


def rows_of(flags):
    return [
        {**row, "chosen_safe": chosen, "rejected_safe": rejected}
        for row, (chosen, rejected) in zip(preference_rows(len(flags)), flags, strict=True)
    ]


def test_unsafe_chosen_is_exchanged_both_unsafe_is_dropped_and_both_are_counted(load):
    plain, plain_report = load(rows_of(FLAGS), by_safety=False)
    table, report = load(rows_of(FLAGS))
    assert plain.safe.T.tolist() == [list(both) for both in FLAGS]
    assert not plain_report.dropped
    assert not any("exchanged" in note for note in plain_report.notes)
    assert table.safe.T.tolist() == [[True, True], [True, False], [True, False]]
    assert [table[0], table[1]] == [plain[0], plain[1]]
    assert (table[2].prompt_ids, table[2].chosen_ids, table[2].rejected_ids) == (
        plain[2].prompt_ids, plain[2].rejected_ids, plain[2].chosen_ids,
    )  # fmt: skip
    assert [len(places) for places in report.dropped.values()] == [1]
    assert report.dropped["both responses unsafe"][0].endswith("line 4")
    assert report.notes["chosen and rejected exchanged: only the chosen was unsafe"] == "1"
    assert (report.read, report.kept) == (4, 3)


def test_dialogues_as_turns_are_exchanged_too(load):
    unsafe, safe = (f"\n\nHuman: how ?\n\nAssistant: {answer}" for answer in ("so .", "no ."))
    table, report = load([{"chosen": unsafe, "rejected": safe, "chosen_safe": False, "rejected_safe": True}])
    tokenizer = build_tokenizer()
    said = [tokenizer.decode(ids) for ids in (table[0].chosen_ids, table[0].rejected_ids)]
    assert said == ["no .<|im_end|>", "so .<|im_end|>"]
    assert "of these, HH-RLHF dialogues read as turns (data.dialogues)" in report.notes


def test_flags_change_neither_tokens_nor_the_key_of_the_scores(load):
    bare, _ = load(preference_rows(2), by_safety=False)
    said, _ = load(rows_of(FLAGS[:2]), by_safety=False)
    assert bare.safe is None
    assert said.content_digest() == bare.content_digest()
    assert load(rows_of(FLAGS[:2]))[0].content_digest() == bare.content_digest()


def test_batches_carry_the_flags_of_their_pairs(load):
    table, _ = load(rows_of(FLAGS), by_safety=False)
    batch = PairDataset(table, 0).collate([(2, 1.0), (1, 1.0)])
    assert batch.safe.tolist() == [[False, True], [True, False]]
    assert table.select(batch.pair_index.numpy()).safe.tolist() == batch.safe.tolist()
    some = rows_of(FLAGS[:2])
    del some[1]["rejected_safe"]
    partly, _ = load(some, by_safety=False)
    assert partly.safe is None
    assert PairDataset(partly, 0).collate([(0, 1.0)]).safe is None


def test_a_pair_that_repeats_another_once_exchanged_is_a_duplicate(load):
    row = {"prompt": "a ?", "chosen": "good .", "rejected": "bad .", "chosen_safe": True, "rejected_safe": False}
    swapped = {"prompt": "a ?", "chosen": "bad .", "rejected": "good .", "chosen_safe": False, "rejected_safe": True}
    table, report = load([row, swapped])
    assert len(table) == 1
    assert "duplicate of an earlier pair" in report.dropped


def test_safe_rlhf_brings_its_own_flags(load):
    rows = [
        safe_rlhf_row("both ?", ["one .", "two ."], [True, True], better=1),
        safe_rlhf_row("one ?", ["bad .", "good ."], [False, True], better=0),
        safe_rlhf_row("none ?", ["bad .", "worse ."], [False, False], better=1, safer=0),
    ]
    options = {"safe_rlhf": SafeRLHFOptions(both_unsafe="safer")}
    kept, _ = load(rows, by_safety=False, **options)
    assert kept.safe.T.tolist() == [[True, True], [True, False], [False, False]]
    table, report = load(rows, **options)
    assert len(table) == 2
    assert len(report.dropped["both responses unsafe"]) == 1


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"chosen_safe": ...}, r"missing column 'chosen_safe'.*data\.load\.columns \({chosen_safe: your_column}\)"),
        ({"chosen_safe": ..., "rejected_safe": ...}, "missing columns 'chosen_safe', 'rejected_safe'"),
        ({"rejected_safe": None}, "line 1: field 'rejected_safe' is missing or null"),
        ({"rejected_safe": "yes"}, "line 1: field 'rejected_safe' must be true or false, got 'yes'"),
    ],
)
def test_what_is_not_said_is_named(load, change, fault):
    row = {**rows_of(FLAGS[:1])[0], **change}
    with pytest.raises(InputError, match=fault):
        load([{name: value for name, value in row.items() if value is not ...}])


def test_columns_of_other_names(load):
    rows = [{**row, "is_safe_1": True, "is_safe_2": False} for row in preference_rows(2)]
    table, _ = load(rows, columns={"chosen_safe": "is_safe_1", "rejected_safe": "is_safe_2"})
    assert table.safe.tolist() == [[True, True], [False, False]]


def test_safe_dpo_on_data_that_does_not_say_stops_at_setup(job):
    with pytest.raises(InputError, match="'chosen_safe', 'rejected_safe'"):
        fit(job(loss=SafeDPOLoss()))


def test_first_loss_of_training_is_the_papers_on_the_rows_as_they_stand(job, tmp_path):
    """Policy = reference: ln 2 for two safe responses, Δ's for one that is not, whichever side; the rest drops out."""
    flags = [FLAGS[i % 4] for i in range(40)]
    write_jsonl(tmp_path / "pairs.jsonl", rows_of(flags))
    module = fit(job(loss=SafeDPOLoss(delta=3.0), trainer={"max_steps": 1}, data={"held_out_fraction": 0.5}))
    data = module.trainer.datamodule
    assert sum(map(len, (data.tables["train"], data.tables["held_out"]))) == 30
    differ = torch.from_numpy(data.tables["held_out"].safe)
    share = (differ[0] != differ[1]).double().mean()
    safe, unsafe = (torch.nn.functional.softplus(torch.tensor(x)).item() for x in (0.0, 3.0))
    expected = (1 - share) * safe + share * unsafe
    assert module.evaluations[0]["held_out/loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_embedded_pairs_are_in_order_already():
    from bdpo_pl.models.loading import ModelSource, load_tokenizer

    tokenizer = PairTokenizer(load_tokenizer(ModelSource(str(embedded.MODEL_DIR))))
    for path in (embedded.TRAIN_FILE, embedded.HELD_OUT_FILE):
        table, report = load_pairs("train", str(path), tokenizer, Truncation(128), by_safety=True)
        assert len(table) == report.read
        assert not any("exchanged" in note for note in report.notes)
        harmful = len(re.findall('"kind": "harmful"', path.read_text(encoding="utf-8")))
        assert table.safe[0].all()
        assert (~table.safe[1]).sum() == harmful
