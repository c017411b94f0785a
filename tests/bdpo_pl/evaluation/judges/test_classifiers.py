"""Classifiers as judges: what they read, which labels count, and what is no classifier."""

import pytest
import torch
from judging import EXCHANGE
from makers import build_model, build_tokenizer, large

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.judges import registry
from bdpo_pl.evaluation.judges.classifier import ClassifierJudge
from bdpo_pl.evaluation.judges.judge import Exchange, Verdict
from bdpo_pl.models.loading import ModelSource


@pytest.fixture(scope="module", params=["qwen2", "distilbert"])
def classifier_dir(request, tmp_path_factory):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp(request.param)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    if request.param == "distilbert":
        sizes = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
    labels = {0: "ANSWER", 1: "REFUSAL", 2: "HARM"}
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, vocab_size=400, id2label=labels, pad_token_id=0, **sizes)
    large(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)).save_pretrained(folder)
    tokenizer = build_tokenizer(chat=False)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder


RESPONSES = [
    "first water it",
    "i cannot help with that , but here is a safer way to do it",
    "no",
    "set traps . ask a neighbour",
]


def direct(folder, texts):
    """Probabilities of each text alone, with no padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [model(**tokenizer(*text, return_tensors="pt")).logits[0] for text in texts]


@pytest.mark.parametrize("reads", ["response", "exchange"])
def test_a_classifier_reads_each_exchange_as_it_would_alone(classifier_dir, reads):
    judge = registry.classifier(
        str(classifier_dir), device="cpu", refused_labels="REFUSAL",
        unsafe_labels=["HARM", "ANSWER"], reads=reads, batch_size=3,
    )  # fmt: skip
    verdicts = judge.judge([Exchange("how do i keep it ?", response) for response in RESPONSES])
    texts = [(response,) if reads == "response" else ("how do i keep it ?", response) for response in RESPONSES]
    shares = [logits.softmax(0) for logits in direct(classifier_dir, texts)]
    assert [v.score for v in verdicts] == pytest.approx([float(s[0] + s[2]) for s in shares], abs=1e-5)
    assert [v.refused for v in verdicts] == [float(s[1]) >= 0.5 for s in shares]
    assert [v.unsafe for v in verdicts] == [float(s[0] + s[2]) >= 0.5 for s in shares]
    assert max(v.score for v in verdicts) - min(v.score for v in verdicts) > 0.01
    assert judge.notes() == {}
    assert judge.facts()["unsafe"] == "HARM, ANSWER"


def test_labels_that_do_not_exclude_each_other(classifier_dir, monkeypatch):
    judge = ClassifierJudge(ModelSource(str(classifier_dir)), unsafe_labels=["HARM", "ANSWER"])
    monkeypatch.setattr(judge._config, "problem_type", "multi_label_classification")
    (verdict,) = judge.judge([Exchange("", RESPONSES[0])])
    (logits,) = direct(classifier_dir, [(RESPONSES[0],)])
    assert verdict.score == pytest.approx(float(logits[[0, 2]].sigmoid().max()), abs=1e-5)
    assert verdict.refused is None


def test_a_classifier_does_not_read_blank_answers(classifier_dir):
    source = ModelSource(str(classifier_dir))
    judge = ClassifierJudge(source, refused_labels=["ANSWER", "REFUSAL", "HARM"])
    assert judge.judge([EXCHANGE, Exchange("why ?", " \n")]) == [Verdict(refused=True), Verdict(refused=False)]
    assert judge.notes() == {"blank answers": 1}
    judge = ClassifierJudge(source, unsafe_labels=["HARM"])
    assert judge.judge([Exchange("why ?", "")]) == [Verdict(unsafe=False, score=0.0)]


def test_what_is_cut_is_counted(classifier_dir):
    source = ModelSource(str(classifier_dir))
    judge = ClassifierJudge(source, refused_labels=["REFUSAL"], unsafe_labels=["HARM"])
    before = dict(judge.facts())
    assert "up to 64 tokens" in before["reads"]
    long = "water " * 200
    whole, cut = judge.judge([Exchange("", "water it"), Exchange("", long)])
    assert judge.notes() == {"cut to the judge's length": 1}
    assert judge.facts() == before
    short = ClassifierJudge(source, unsafe_labels=["HARM"], max_length=2)
    assert short.judge([Exchange("", "water it in the morning")])[0].score != whole.score
    assert 0 < cut.score < 1


def test_positions_that_begin_after_padding_leave_room_for_fewer_tokens(tmp_path):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    tokenizer = build_tokenizer(chat=False)
    tokenizer.pad_token = "</s>"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    RobertaForSequenceClassification(
        RobertaConfig(vocab_size=400, pad_token_id=tokenizer.pad_token_id, max_position_embeddings=12, **sizes)
    ).save_pretrained(tmp_path)
    judge = ClassifierJudge(ModelSource(str(tmp_path)), refused_labels=["LABEL_1"])
    assert f"up to {12 - tokenizer.pad_token_id - 1} tokens" in judge.facts()["reads"]
    assert len(judge.judge([Exchange("", "water " * 30)])) == 1
    assert judge.notes() == {"cut to the judge's length": 1}


def test_faults_of_a_classifier(classifier_dir, model_dir, tmp_path):
    name = str(classifier_dir)
    with pytest.raises(InputError, match=r"name the labels .*ANSWER, REFUSAL, HARM"):
        registry.classifier(name)
    with pytest.raises(InputError, match="no label 'refusal'; it has ANSWER"):
        registry.classifier(name, refused_labels=["refusal"])
    # A language model has two labels by default and no weights for them.
    language_model = ClassifierJudge(ModelSource(str(model_dir)), refused_labels=["LABEL_1"])
    with pytest.raises(InputError, match=r"lacks 1 weights of \w+ \(first: score\.weight\)"):
        language_model.judge([EXCHANGE])
    with pytest.raises(InputError, match="no model folder"):
        registry.classifier(str(tmp_path / "none"), refused_labels=["x"])
    build_model("gpt2").save_pretrained(tmp_path)
    tokenizer = build_tokenizer(chat=False)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no padding token"):
        ClassifierJudge(ModelSource(str(tmp_path)), refused_labels=["LABEL_1"]).judge([EXCHANGE])
