"""Upload of an exported model to the Hugging Face hub: the repository is made before training, and filled after it.

A token comes from `hf auth login` or HF_TOKEN, never from an option, which would stand in config.yaml.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from bdpo_pl.errors import InputError, MachineError, first_line


class HubUpload:
    """A repository on the hub that gets the exported model.

    Args:
        name: name of the repository, as in `OWNER/NAME`.
        private: make a new repository private; one that exists stays as it is.
        api: client of the hub. Default: huggingface_hub's.

    Raises:
        InputError: this is no name of a repository.
    """

    def __init__(self, name: str, private: bool, api: HfApi | None = None) -> None:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise InputError(f"push_to_hub is {name}, which is no name of a repository: {first_line(error)}") from error
        self.name = name
        self.private = private
        self.api = api or HfApi()

    def make_repository(self) -> None:
        """Make the repository, if there is none, so that a wrong name or token ends the run before it trains.

        Raises:
            InputError: the hub refuses, or does not answer.
        """
        try:
            self.api.create_repo(self.name, private=self.private, exist_ok=True)
        except Exception as error:  # releases of huggingface_hub speak through clients with errors of their own
            raise InputError(
                f"push_to_hub: the hub makes no repository {self.name} ({first_line(error)}). Log in with `hf auth "
                "login`, or set HF_TOKEN to a token that may write there; or leave push_to_hub out"
            ) from error

    def send(self, folder: Path, what: str) -> str:
        """Upload the files of `folder` in one commit, and return the address of the repository.

        Args:
            folder: exported model, with its card as README.md.
            what: title of the commit.

        Raises:
            MachineError: the upload failed; the message says how to upload the folder by hand.
        """
        try:
            self.api.upload_folder(repo_id=self.name, folder_path=folder, commit_message=what)
        except Exception as error:  # whatever it is, the model is there, and must be said to be
            raise MachineError(
                f"the model is trained and is in {folder}, but its upload to {self.name} failed ({first_line(error)}). "
                f"Repeat it with: hf upload {self.name} {folder}"
            ) from error
        return f"{self.api.endpoint}/{self.name}"
