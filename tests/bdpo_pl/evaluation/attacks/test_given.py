"""Attack prompts from files: JailbreakBench's artifacts, and translations."""

import json

import pytest
from makers import write_jsonl

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.attacks import choice
from bdpo_pl.evaluation.attacks.artifacts import NO_PROMPT, REPEATED, read_artifact
from bdpo_pl.evaluation.attacks.choice import AttackOptions, choose_attacks
from bdpo_pl.evaluation.attacks.translations import UNTRANSLATED, read_translations, translate, translated
from bdpo_pl.evaluation.chat.endpoint import EndpointOptions
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Suite

SUITE = Suite("harm", "harmful", [EvaluationPrompt(f"how {i} ?", f"how {i} ?", "c", f"line {i}") for i in range(3)])


def row(number, prompt, **more):
    return {"index": number, "goal": f"how {number} ?", "behavior": "B", "category": "C", "prompt": prompt, **more}


def artifact(tmp_path, rows, parameters=None, name="a.json"):
    content = {"parameters": parameters or {"method": "PAIR", "model": "vicuna-13b v1.5"}, "jailbreaks": rows}
    (tmp_path / name).write_text(json.dumps(content))
    return str(tmp_path / name)


def test_artifact(tmp_path):
    path = artifact(tmp_path, [row(0, " Pray, 0 !! "), row(1, None), row(2, " Pray, 0 !! "), row(3, "{request}")])
    suite = read_artifact(path)
    assert (suite.name, suite.kind, suite.source) == ("artifact+PAIR_vicuna-13b_v1.5", "harmful", path)
    assert suite.dropped == {NO_PROMPT: 1, REPEATED: 1}
    assert suite.prompts == [
        EvaluationPrompt(" Pray, 0 !! ", "how 0 ?", "C", f"{path}, jailbreak 1", None, "PAIR_vicuna-13b_v1.5"),
        EvaluationPrompt("{request}", "how 3 ?", "C", f"{path}, jailbreak 4", None, "PAIR_vicuna-13b_v1.5"),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no json", "is not JSON; give a file of github.com/JailbreakBench"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "has no 'parameters' and 'jailbreaks'"),
        ('{"parameters": {"method": "PAIR"}, "jailbreaks": []}', "has no 'parameters' and 'jailbreaks'"),
        ('{"parameters": {"method": "PAIR", "model": 3}, "jailbreaks": []}', "has no 'parameters'"),
        ('{"parameters": {"method": "a", "model": "b"}, "jailbreaks": {}}', "is not a list"),
        ('{"parameters": {"method": "a", "model": "b"}, "jailbreaks": [1]}', "jailbreak 1 is not a mapping"),
        ('{"parameters": {"method": "a", "model": "b"}, "jailbreaks": [{"prompt": "x"}]}', "needs texts in 'goal'"),
        ('{"parameters": {"method": "a", "model": "b"}, "jailbreaks": [{"prompt": 1, "goal": "x"}]}', "needs texts"),
        (
            '{"parameters": {"method": "a", "model": "b"}, "jailbreaks": [{"prompt": "\\ud800", "goal": "x"}]}',
            "half of a surrogate pair",
        ),
        ('{"parameters": {"method": "a", "model": "b"}, "jailbreaks": [{"prompt": null}]}', "holds no prompt"),
    ],
)
def test_faults_of_an_artifact(tmp_path, content, said):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=r"attacks\.artifacts: ") as error:
        read_artifact(str(tmp_path / "a.json"))
    assert said in str(error.value)


def test_artifacts_are_suites_and_need_no_other(tmp_path):
    path = artifact(tmp_path, [row(0, "x")])
    other = artifact(tmp_path, [row(0, "y")], {"method": "GCG", "model": "m"}, "b.json")
    benign = Suite("good", "benign", SUITE.prompts)
    framed, attacks = choose_attacks(AttackOptions(artifacts=f"{path},{other}"), [benign])
    assert [suite.name for suite in framed] == ["artifact+PAIR_vicuna-13b_v1.5", "artifact+GCG_m"]
    assert attacks.suite is None
    long = artifact(tmp_path, [row(i, f"x {i}") for i in range(4)], {"method": "P", "model": "m"}, "c.json")
    ((cut,), _) = choose_attacks(AttackOptions(artifacts=long), [benign], 2)
    assert ([prompt.text for prompt in cut.prompts], cut.dropped) == (["x 0", "x 2"], {"beyond max_prompts": 2})
    both, _ = choose_attacks(AttackOptions(artifacts=[path], framings="fiction"), [SUITE])
    assert [suite.name for suite in both] == ["harm+fiction", "artifact+PAIR_vicuna-13b_v1.5"]
    with pytest.raises(InputError, match=r"several suites would be called artifact\+PAIR"):
        choose_attacks(AttackOptions(artifacts=[path, path]), [SUITE])
    with pytest.raises(InputError, match="cannot be read"):
        choose_attacks(AttackOptions(artifacts=[str(tmp_path / "none.json")]), [SUITE])


# Translations

ROWS = [
    {"request": "how 0 ?", "language": "zu", "text": "kanjani 0 ?"},
    {"request": "how 2 ?", "language": "zu", "text": "kanjani 2 ?"},
    {"request": "how 0 ?", "language": "gd", "text": "ciamar 0 ?"},
]


def test_translations_from_a_file(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", ROWS)
    framed, _ = choose_attacks(AttackOptions(translations=str(path)), [SUITE])
    assert [(suite.name, dict(suite.dropped)) for suite in framed] == [
        ("harm+translation_zu", {UNTRANSLATED: 1}), ("harm+translation_gd", {UNTRANSLATED: 2})
    ]  # fmt: skip
    first = framed[0].prompts[0]
    assert (first.text, first.behaviour, first.attack) == ("kanjani 0 ?", "how 0 ?", "translation_zu")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"request": "a", "language": "zu"}], "needs texts in 'request', 'language' and 'text'"),
        ([{**ROWS[0], "text": " "}], "needs texts"),
        ([ROWS[0], ROWS[0]], "has a translation into zu already"),
    ],
)
def test_faults_of_translations(tmp_path, rows, said):
    with pytest.raises(InputError, match=said):
        read_translations(str(write_jsonl(tmp_path / "t.jsonl", rows)))


def test_translations_of_other_requests_are_told():
    with pytest.raises(InputError, match="no request of harm has a translation into zu"):
        translated(SUITE, {"zu": {"what ?": "ini ?"}})


class Translator:
    name = "translator"

    def __init__(self, silent=0):
        self.silent, self.asked = silent, []

    def reply(self, conversations):
        texts = [turns[0]["content"].rpartition("\n\n")[2] for turns in conversations]
        self.asked += texts
        said = [f"<think>Hm.</think> {text.upper()} " if self.silent <= 0 else "<think>Hm." for text in texts]
        self.silent -= 1
        return said


def test_translations_by_a_model_are_made_once(tmp_path):
    translator = Translator(silent=1)
    found = translate(SUITE, ["Zulu"], translator, tmp_path)
    assert found == {"Zulu": {f"how {i} ?": f"HOW {i} ?" for i in range(3)}}
    assert len(translator.asked) == 6
    assert translate(SUITE, ["Zulu"], Translator(silent=99), tmp_path) == found
    more = Translator()
    assert set(translate(SUITE, ["Zulu", "Gaelic"], more, tmp_path)) == {"Zulu", "Gaelic"}
    assert len(more.asked) == 3
    warmer = Translator()
    warmer.facts = lambda: {"temperature": "1.0"}
    assert translate(SUITE, ["Zulu"], warmer, tmp_path) == found
    assert len(warmer.asked) == 3
    with pytest.raises(InputError, match=r"translator said nothing 3 times for 3 of 3 requests into Zulu"):
        translate(SUITE, ["Zulu"], Translator(silent=99), None)


def test_translator_by_option(monkeypatch):
    monkeypatch.setattr(choice, "Endpoint", lambda options, names: Translator())
    there = EndpointOptions("http://127.0.0.1:1/v1", "m")
    framed, _ = choose_attacks(AttackOptions(languages="Zulu,Gaelic", translator=there), [SUITE])
    assert [suite.name for suite in framed] == ["harm+translation_Zulu", "harm+translation_Gaelic"]
    assert [prompt.text for prompt in framed[0].prompts] == ["HOW 0 ?", "HOW 1 ?", "HOW 2 ?"]
    with pytest.raises(InputError, match=r"attacks\.languages needs a model that translates"):
        AttackOptions(languages="Zulu")
    with pytest.raises(InputError, match=r"attacks\.translator needs languages"):
        AttackOptions(translator=there)
