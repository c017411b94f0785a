"""What a result keeps of its command."""

from benchmarks.written import command_line


def test_a_command_names_files_without_their_folders(monkeypatch):
    arguments = [
        "--real",
        "/home/someone/smol",
        "data/pairs.jsonl.gz",
        "--model=A=/srv/model",
        "--only",
        "ours, DPO",
        "-n1",
    ]
    wanted = ["--real", "smol", "pairs.jsonl.gz", "--model=A=model", "--only", "ours, DPO", "-n1"]
    assert command_line("benchmarks.jobs", arguments) == ["python", "-m", "benchmarks.jobs", *wanted]
    monkeypatch.setattr("sys.argv", ["program", *arguments])
    assert command_line("benchmarks.jobs")[3:] == wanted
