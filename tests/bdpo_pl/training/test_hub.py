"""Uploads to the hub: what is sent, and what happens where the hub refuses or the line is cut."""

import inspect

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import get_session

from bdpo_pl.cli import aligning
from bdpo_pl.errors import InputError, MachineError
from bdpo_pl.fit import main
from bdpo_pl.training.hub import HubUpload


def cut():
    """The error of the client that huggingface_hub speaks through: httpx's, which is no OSError, or requests'."""
    client = type(get_session()).__module__.partition(".")[0]
    package = __import__(client)
    return getattr(package, "ConnectError", getattr(package, "ConnectionError", None))("the line is cut")


class Hub:
    """A double of the client: takes the calls that the real one takes, and keeps what was sent."""

    endpoint = "https://hub"

    def __init__(self, refuses=None, breaks=None):
        self.calls = []
        self.refuses, self.breaks = refuses, breaks

    def create_repo(self, *args, **kwargs):
        inspect.signature(HfApi.create_repo).bind(self, *args, **kwargs)
        if self.refuses:
            raise self.refuses
        self.calls.append(("create", args, kwargs))

    def upload_folder(self, **kwargs):
        inspect.signature(HfApi.upload_folder).bind(self, **kwargs)
        if self.breaks:
            raise self.breaks
        files = {path.name for path in kwargs["folder_path"].iterdir()}
        self.calls.append(("upload", files, kwargs))


@pytest.fixture
def command(model_dir, preference_file, tmp_path, monkeypatch):
    """Runs fit with a double of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BDPO_PL_CACHE", str(tmp_path / "cache"))

    def run(hub, *options):
        monkeypatch.setattr(aligning, "HubUpload", lambda name, private: HubUpload(name, private, hub))
        main([
            f"--model.policy={model_dir}", f"--data.train={preference_file}", "--trainer.accelerator=cpu",
            "--trainer.max_steps=1", "--trainer.num_sanity_val_steps=0", "--data.held_out_fraction=0",
            "--trainer.enable_progress_bar=false", *options,
        ])  # fmt: skip

    return run


def test_a_run_ends_with_the_model_and_its_card_on_the_hub(command, tmp_path, capsys):
    hub = Hub()
    command(hub, "--push_to_hub=me/safe")
    (made, name, private), (sent, files, how) = hub.calls
    assert (made, name, private) == ("create", ("me/safe",), {"private": True, "exist_ok": True})
    assert sent == "upload"
    assert {"model.safetensors", "config.json", "tokenizer_config.json", "README.md"} <= files
    assert not any(name.endswith((".ckpt", ".bin", ".pt")) for name in files)
    assert how["repo_id"] == "me/safe"
    assert how["folder_path"].resolve() == (tmp_path / "runs/version_0/model").resolve()
    assert "token" not in how
    assert "Uploaded to https://hub/me/safe" in capsys.readouterr().out


def test_a_hub_that_refuses_ends_the_run_before_it_trains(command, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(Hub(refuses=LocalTokenNotFoundError("no token")), "--push_to_hub=me/safe")
    assert stopped.value.code == 2
    assert "the hub makes no repository me/safe (no token). Log in with `hf auth login`" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "version_0" / "metrics.csv").exists()


def test_a_report_that_fails_does_not_cost_the_upload(command, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("no such axis")

    monkeypatch.setattr(aligning, "run_page", fail)
    hub, logged = Hub(), []
    monkeypatch.setattr(aligning, "log_files", lambda _, files: logged.extend(file.name for file in files))
    command(hub, "--push_to_hub=me/safe")
    assert [call[0] for call in hub.calls] == ["create", "upload"]
    assert logged == ["config.yaml"]
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: The report was not written (ValueError: no such axis)" in said
    assert "report of the run" not in said


def test_a_hub_that_cannot_be_reached_is_an_error_that_says_what_to_do():
    with pytest.raises(InputError, match=r"no repository me/safe \(the line is cut\).*leave push_to_hub out"):
        HubUpload("me/safe", True, Hub(refuses=cut())).make_repository()


def test_an_upload_that_fails_leaves_a_whole_run_and_says_how_to_repeat_it(command, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(Hub(breaks=cut()), "--push_to_hub=me/safe")
    assert stopped.value.code == 4
    said = " ".join(capsys.readouterr().err.split())
    assert "failed (the line is cut). Repeat it with: hf upload me/safe" in said
    folder = tmp_path / "runs" / "version_0"
    assert (folder / "summary.json").is_file()
    assert (folder / "report.html").is_file()
    assert (folder / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--push_to_hub=a/b/c"], "no name of a repository"),
        (["--push_to_hub=me/safe", "--export=false"], "nothing to push_to_hub"),
        (["--hub_private_repo=false"], "push_to_hub, which is not set"),
    ],
)
def test_options_that_do_nothing_are_refused(command, options, fault, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(Hub(), *options)
    assert stopped.value.code == 2
    assert fault in " ".join(capsys.readouterr().err.split())


def test_the_real_client_offline_is_an_error_that_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    upload = HubUpload("me/safe", private=True)
    with pytest.raises(InputError, match="leave push_to_hub out"):
        upload.make_repository()
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(MachineError, match="hf upload me/safe"):
        upload.send(tmp_path, "title")
