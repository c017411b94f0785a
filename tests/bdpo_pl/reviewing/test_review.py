"""The page to label answers and to write chosen ones."""

import json
import shutil
import subprocess
import threading
from http.client import HTTPConnection
from importlib import resources
from urllib.parse import urlsplit

import pytest
from browser import Browser
from makers import write_jsonl

from bdpo_pl import review
from bdpo_pl.errors import InputError
from bdpo_pl.reviewing.rows import ReviewFile, reviewing
from bdpo_pl.reviewing.server import make_server

ANSWERS = [{"prompt": f"query {i} ?", "response": f"<b>answer {i}</b>", "own": i} for i in range(3)]
FAILURES = [{"prompt": f"query {i} ?", "chosen": None, "rejected": f"bad {i}", "suite": "s"} for i in range(2)]

# Waits until the page says something that holds a text; a visitor's eyes.
EYES = """
const until = (id, text) => new Promise((done, lost) => {
  const look = n => document.getElementById(id).textContent.includes(text) ? done()
    : n ? setTimeout(look, 20, n - 1) : lost(new Error(id + ': ' + document.getElementById(id).textContent));
  look(500);
});
const press = (key, more = {}, on = document) =>
  on.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true, ...more}));
"""

# A document of named elements, just enough for the script of the page, which follows and runs in node.
DOCUMENT = """
const elements = {}, listeners = {};
const element = () => ({value: '', textContent: '', setAttribute() {}, focus() {}, blur() {}});
const getElementById = id => elements[id] ??= element();
globalThis.document = {getElementById, querySelectorAll: () => [], addEventListener() {}};
globalThis.window = {addEventListener: (name, run) => { listeners[name] = run; }};
globalThis.location = {search: '?token=x'};
const given = [{prompt: 'a', rejected: 'x', chosen: 'old'}, {prompt: 'b', rejected: 'y'}];
let refuses = false;
const file = {kind: 'chosen', name: 'f', rows: given};
globalThis.fetch = async path => ({
  ok: !refuses, json: async () => refuses ? {error: 'full disk'} : path === '/rows' ? file : {left: 0},
});
"""
VISIT = """
const settle = () => new Promise(done => setTimeout(done));
const type = text => { elements.write.value = text; elements.write.oninput(); };
const leaves = () => {
  let asked = false;
  listeners.beforeunload({preventDefault() { asked = true; }});
  return !asked;
};
(async () => {
  const seen = [];
  const see = () => seen.push([elements.prompt.textContent, elements.write.value, leaves()]);
  await settle(); see();
  type('a long answer'); see();
  for (const way of ['next', 'back', 'open', 'next', 'back']) { elements[way].onclick(); see(); }
  elements.next.onclick(); refuses = true; elements.save.onclick(); await settle(); see();
  refuses = false; elements.save.onclick(); await settle(); see();
  seen.push(elements.said.textContent);
  elements.back.onclick(); type('changed'); elements.back.onclick(); see(); type('old'); see();
  console.log(JSON.stringify(seen));
})();
"""


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        server, link = make_server(ReviewFile(path))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return path, link

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(link, method, path, token=None, body=None, **headers):
    place = urlsplit(link)
    connection = HTTPConnection(place.hostname, place.port, timeout=10)
    headers = {"X-Token": place.query.removeprefix("token=") if token is None else token, **headers}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_answers_are_saved_at_once_and_other_fields_stay(serve):
    path, link = serve(ANSWERS)
    assert ask(link, "POST", "/answer", body={"index": 1, "value": "refusal"}) == (200, '{"left": 2}')
    assert lines(path) == [ANSWERS[0], {**ANSWERS[1], "label": "refusal"}, ANSWERS[2]]
    assert ask(link, "POST", "/answer", body={"index": 1, "value": None})[0] == 200
    assert lines(path)[1]["label"] is None


@pytest.mark.parametrize(
    "body", [{"index": 9, "value": "refusal"}, {"index": 0, "value": "perhaps"}, {"index": True, "value": "refusal"},
             {"index": 0, "value": 3}, {"value": "refusal"}, [1], "refusal"]
)  # fmt: skip
def test_what_is_no_answer_changes_nothing(serve, body):
    path, link = serve(ANSWERS)
    before = path.read_bytes()
    assert ask(link, "POST", "/answer", body=body)[0] == 400
    assert path.read_bytes() == before


def test_half_a_surrogate_pair_in_the_file_stays_and_blocks_nothing(serve):
    rows = [{"prompt": "é", "response": "cut here \ud83d"}, {"prompt": "é", "response": "whole"}]
    path, link = serve(rows)
    for index in (1, 0):
        assert ask(link, "POST", "/answer", body={"index": index, "value": "refusal"})[0] == 200
    labelled = [{**row, "label": "refusal"} for row in rows]
    assert lines(path) == labelled
    assert path.read_text(encoding="utf-8").splitlines()[1].startswith('{"prompt": "é"')
    assert json.loads(ask(link, "GET", "/rows")[1])["rows"] == labelled


def test_half_a_surrogate_pair_in_an_answer_is_refused(serve):
    path, link = serve(FAILURES)
    status, text = ask(link, "POST", "/answer", body={"index": 0, "value": "good \ud83d"})
    assert (status, "half a character" in text) == (400, True)
    assert ask(link, "POST", "/answer", body={"index": 1, "value": "good \U0001f600"}) == (200, '{"left": 1}')
    assert [row["chosen"] for row in lines(path)] == [None, "good \U0001f600"]


def test_what_something_else_wrote_is_not_overwritten(serve):
    path, link = serve(FAILURES)
    assert ask(link, "POST", "/answer", body={"index": 0, "value": "mine"})[0] == 200
    path.write_text(path.read_text().replace("mine", "from an editor"))
    before = path.read_bytes()
    status, text = ask(link, "POST", "/answer", body={"index": 1, "value": "also mine"})
    assert status == 400
    assert "was changed by something else" in text
    assert "start it again" in text
    assert path.read_bytes() == before


def test_a_row_is_not_answered_while_its_file_cannot_be_written(tmp_path, monkeypatch):
    file = ReviewFile(write_jsonl(tmp_path / "rows.jsonl", ANSWERS))

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("bdpo_pl.reviewing.rows.write_whole", fail)
    for error in (OSError(28, "No space left on device"), MemoryError()):
        with pytest.raises(InputError if isinstance(error, OSError) else MemoryError):
            file.answer(0, "refusal")
        assert file.rows == ANSWERS
    monkeypatch.undo()
    file.answer(0, "refusal")
    assert file.left == 2


def test_only_who_has_the_link_is_served(serve):
    path, link = serve(ANSWERS)
    assert link.startswith("http://127.0.0.1:")
    for method, where in (("GET", "/"), ("GET", "/rows"), ("POST", "/answer")):
        for wrong in ({"token": ""}, {"token": "guess"}, {"Host": "evil.example:80"}):
            status, text = ask(link, method, where, body={"index": 0, "value": "refusal"}, **wrong)
            assert status == 403
            assert "query 0" not in text
    assert ask(link, "GET", "/../../etc/passwd")[0] == 404
    assert lines(path) == ANSWERS


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "no rows"), ("{", "line 1: not JSON"), ('{"prompt": 3}', "line 1: a row needs a text in prompt"),
     ('{"prompt": "a"}', "every row needs prompt and response")],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, text, said, capsys):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        review.main([str(tmp_path / "rows.jsonl")])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        review.main([str(tmp_path / "nowhere.jsonl")])


@pytest.mark.parametrize("option", ["--port=99999", "--port=-1", "--port=²", "--port", "--open=yes"])
def test_wrong_options_are_refused_by_name(tmp_path, option, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", ANSWERS)
    with pytest.raises(SystemExit) as stopped:
        review.main([str(path), option])
    assert stopped.value.code == 2
    assert f"{option.partition('=')[0]} is '{option.partition('=')[2]}'; give" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_saving_an_answer_keeps_the_permissions(tmp_path, mode):
    path = write_jsonl(tmp_path / "rows.jsonl", ANSWERS)
    path.chmod(mode)
    ReviewFile(path).answer(0, "refusal")
    assert lines(path)[0]["label"] == "refusal"
    assert path.stat().st_mode & 0o777 == mode


def test_a_file_is_reviewed_by_one_process_at_a_time(tmp_path, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", ANSWERS)
    (tmp_path / "other.jsonl").symlink_to(path)
    with reviewing(path) as file:
        for same in (path, tmp_path / "other.jsonl"):
            with pytest.raises(SystemExit) as stopped:
                review.main([str(same), "--open=false"])
            assert stopped.value.code == 2
            assert "is open in another bdpo review; end that one first" in " ".join(capsys.readouterr().err.split())
        file.answer(0, "refusal")
    with reviewing(path) as file:
        assert file.left == 2
    assert {child.name for child in tmp_path.iterdir()} == {"rows.jsonl", "other.jsonl"}


def test_answers_through_a_link_go_to_the_file_behind_it(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ANSWERS)
    (tmp_path / "other.jsonl").symlink_to(path)
    ReviewFile(tmp_path / "other.jsonl").answer(0, "refusal")
    assert lines(path)[0]["label"] == "refusal"
    assert (tmp_path / "other.jsonl").is_symlink()


def test_rejected_is_no_chosen(tmp_path):
    file = ReviewFile(write_jsonl(tmp_path / "rows.jsonl", FAILURES))
    with pytest.raises(InputError, match="is the rejected one"):
        file.answer(0, "bad 0")


def test_a_visitor_labels_by_keyboard(serve, tmp_path):
    path, link = serve(ANSWERS)
    script = f"""(async () => {{ {EYES}
      await until('prompt', 'query 0');
      press('r'); await until('prompt', 'query 1');
      press('c'); await until('prompt', 'query 2');
      press('ArrowLeft'); press('u'); await until('said', 'removed');
      press('r'); await until('place', '1 left');
    }})()"""
    with Browser(tmp_path / "profile") as browser:
        visit = browser.visit(link, script=script)
        assert [row.get("label") for row in lines(path)] == ["refusal", "refusal", None]
        assert visit.title == "Review of rows.jsonl"
        # Text of the data is text.
        assert "<b>answer 2</b>" in visit.text
        phone = browser.visit(link, width=420, dark=True)
    for seen in (visit, phone):
        assert (seen.complaints, seen.overflow, seen.nameless) == ([], 0, 0)
        assert all(request.startswith(link.partition("?")[0]) for request in seen.requests)


def test_a_visitor_writes_chosen_answers(serve, tmp_path):
    path, link = serve(FAILURES)
    script = f"""(async () => {{ {EYES}
      await until('prompt', 'query 0');
      const write = document.getElementById('write');
      press('e'); write.value = 'good\\n0';
      press('Enter', {{ctrlKey: true}}, write); await until('prompt', 'query 1');
      write.value = 'bad 1'; document.getElementById('save').click(); await until('said', 'not saved');
      write.value = 'good 1'; press('Enter', {{ctrlKey: true}}, write); await until('said', 'Every row has an answer');
    }})()"""
    with Browser(tmp_path / "profile") as browser:
        browser.visit(link, script=script)
    assert [row["chosen"] for row in lines(path)] == ["good\n0", "good 1"]
    assert [row["suite"] for row in lines(path)] == ["s", "s"]


def test_typed_text_stays_with_its_row_until_it_is_saved():
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node here to run the script of the page: apt-get install nodejs")
    page = resources.files("bdpo_pl.reviewing").joinpath("review.html").read_text(encoding="utf-8")
    script = page.partition('<script nonce="{{nonce}}">')[2].partition("</script>")[0]
    done = subprocess.run([node, "-"], input=DOCUMENT + script + VISIT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *seen, changed, restored = json.loads(done.stdout)
    typed, other = ["b", "a long answer", False], ["a", "old", False]
    assert seen == [
        ["b", "", True], typed,
        typed, other, typed, typed, other,
        typed, ["b", "a long answer", True], "Every row has an answer. You may close this page.",
    ]  # fmt: skip
    assert (changed, restored) == (["a", "changed", False], ["a", "old", True])


def test_a_visitor_goes_away_from_typed_text_and_comes_back(serve, tmp_path):
    path, link = serve(FAILURES)
    script = f"""(async () => {{ {EYES}
      await until('prompt', 'query 0');
      const write = document.getElementById('write');
      write.value = 'typed'; write.dispatchEvent(new Event('input'));
      press('n'); await until('prompt', 'query 1');
      if (write.value) throw new Error('text of another row');
      if (window.dispatchEvent(new Event('beforeunload', {{cancelable: true}}))) throw new Error('left without a word');
      press('ArrowLeft'); await until('place', 'not saved');
      press('Enter', {{ctrlKey: true}}, write); await until('said', 'saved; 1 left');
      if (!window.dispatchEvent(new Event('beforeunload', {{cancelable: true}}))) throw new Error('held back');
    }})()"""
    with Browser(tmp_path / "profile") as browser:
        browser.visit(link, script=script)
    assert [row["chosen"] for row in lines(path)] == ["typed", None]
