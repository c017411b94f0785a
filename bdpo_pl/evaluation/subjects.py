"""Models to evaluate: a Hugging Face folder or hub name, a checkpoint of a run, or a model behind a server."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NoReturn

import torch
import yaml  # type: ignore[import-untyped]

from bdpo_pl import embedded
from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.embedded import EMBEDDED
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.answerers import (
    SERVER_NAMES,
    Answerer,
    GenerationOptions,
    LocalAnswerer,
    ServedAnswerer,
)
from bdpo_pl.evaluation.chat.endpoint import EndpointOptions, MaxTokensName, check_urls
from bdpo_pl.evaluation.spread import SpreadAnswerer
from bdpo_pl.forward.response_text import ResponseText
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.checkpoint import checkpoint_model, read_checkpoint, require_same_base, require_same_reading
from bdpo_pl.models.loading import (
    ModelSource,
    frozen,
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
    num_positions,
)


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
        label: name in the report.
        source: the model or, for a checkpoint, the model that it was trained from.
        checkpoint: file with weights that replace the source's.
    """

    label: str
    source: ModelSource
    checkpoint: Path | None = None

    @cached_property
    def tokenizer(self) -> TokenizerLike:
        """Tokenizer of the source.

        Raises:
            InputError: it cannot be loaded, or the run of the checkpoint had another tokenizer or chat template.
        """
        tokenizer = load_tokenizer(self.source)
        if self.checkpoint is not None:
            require_same_reading(self.checkpoint, tokenizer, self.source.name)
        return tokenizer

    @cached_property
    def _own_fingerprint(self) -> str:
        # Digest over all files of the source.
        found = model_fingerprint(self.source)
        if self.checkpoint is not None:
            require_same_base(self.checkpoint, self.source, found)
        return found

    def fingerprint(self) -> str:
        """String that identifies the weights.

        Raises:
            InputError: the source is another model than the one that the checkpoint's adapters were trained on.
        """
        own = self._own_fingerprint
        if self.checkpoint is None:
            return own
        status = self.checkpoint.stat()
        # A checkpoint may have tens of gigabytes, so it is identified by size and time instead of a digest.
        return f"{own}+{self.checkpoint.resolve()}:{status.st_size}:{status.st_mtime_ns}"

    @property
    def place(self) -> str:
        """Location, for reports."""
        return str(self.checkpoint or self.source.name)

    @cached_property
    def window(self) -> int | None:
        """Maximum number of tokens of a prompt and its answer; None if the configuration does not state it."""
        return num_positions(load_config(self.source))

    def answerer(
        self,
        dtype: torch.dtype,
        load: Callable[[], tuple[CausalLM, TokenizerLike]],
        options: GenerationOptions,
        further: Sequence[torch.device] = (),
    ) -> Answerer:
        """Return the model as an `Answerer`.

        Args:
            dtype: dtype of the weights.
            load: function that returns (model, tokenizer); it is called when the first answer is generated.
            options: options of the generation.
            further: devices that answer too, besides that of `load`.
        """
        facts = {"model": self.fingerprint(), "dtype": str(dtype)}
        if ResponseText(self.tokenizer).is_special:
            # Earlier versions recorded answers and verdicts that do not tell thoughts from the rest.
            facts["thoughts"] = "between special tokens"
        own = LocalAnswerer(facts, self.tokenizer, load, options)
        if not further:
            return own
        # A copy without what this one has cached, because it is sent to processes.
        bare = replace(self)
        return SpreadAnswerer(own, options, [(str(device), partial(bare._load, dtype, device)) for device in further])

    @staticmethod
    def never() -> NoReturn:
        """Stand in for `load` where no answer is generated."""
        raise AssertionError("nothing is generated here")

    def load(self, dtype: torch.dtype, device: torch.device) -> tuple[CausalLM, TokenizerLike]:
        """Return (model in evaluation mode on `device`, its tokenizer).

        Raises:
            InputError: the model cannot be loaded, or it is not the one that the checkpoint's adapters were trained on.
        """
        if self.checkpoint is not None:
            self.fingerprint()
        return self._load(dtype, device)

    def _load(self, dtype: torch.dtype, device: torch.device) -> tuple[CausalLM, TokenizerLike]:
        """Load the model without another look at all files of its source."""
        tokenizer = self.tokenizer
        if self.checkpoint is None:
            model = load_model(self.source, dtype)
        else:
            model = checkpoint_model(self.checkpoint, self.source, dtype)
            model.config.use_cache = False
        return frozen(model, device), tokenizer


@dataclass
class ServerOptions:
    """Requests to servers of models that are given by an address.

    Args:
        model: the server's name for the model, for addresses that do not end with `#NAME`.
        api_key_env: environment variable that contains the key.
        timeout: seconds to wait for data in each attempt.
        retries: number of further attempts after a temporary failure.
        parallel: number of simultaneous requests to each server.
        temperature: sampling temperature, 0 for greedy decoding; null omits it from the request.
        deadline: seconds to wait for a whole answer, in each attempt.
        max_bytes: maximum number of bytes of a whole answer; a longer one is an error, and reading stops.
        max_tokens_name: name of the maximum number of tokens in a request; OpenAI's reasoning models take only
            `max_completion_tokens`.
    """

    model: str = ""
    api_key_env: str = EndpointOptions.api_key_env
    timeout: float = EndpointOptions.timeout
    retries: int = EndpointOptions.retries
    parallel: int = EndpointOptions.parallel
    temperature: float | None = EndpointOptions.temperature
    deadline: float = EndpointOptions.deadline
    max_bytes: int = EndpointOptions.max_bytes
    max_tokens_name: MaxTokensName = EndpointOptions.max_tokens_name


@dataclass(frozen=True)
class ServedSubject:
    """A model behind an OpenAI-compatible server.

    Attributes:
        label: name in the report.
        url: address of the server's API, or of several servers of the same model, separated by commas.
        model: the server's name for it.
        server: options of the requests.
        window: None, because servers do not report it.
    """

    label: str
    url: str
    model: str
    server: ServerOptions = field(default_factory=ServerOptions)
    window: None = None

    @property
    def place(self) -> str:
        """Location, for reports."""
        return f"{self.model} at {self.url}"

    def answerer(
        self,
        dtype: torch.dtype,
        load: Callable[[], tuple[CausalLM, TokenizerLike]],
        options: GenerationOptions,
        further: Sequence[torch.device] = (),
    ) -> Answerer:
        """Return the model as an `Answerer`; only `options` are used, because the server holds the weights.

        Raises:
            InputError: an option is not available behind a server, or there is no key.
        """
        if options.chat_template_kwargs or not options.use_template:
            raise InputError(
                f"{self.label}: a server renders its own chat template; set generation.use_template and "
                "generation.chat_template_kwargs where it is started, and leave them out here"
            )
        there = EndpointOptions(
            self.url,
            self.model,
            self.server.api_key_env,
            max_tokens=options.room,
            timeout=self.server.timeout,
            retries=self.server.retries,
            parallel=self.server.parallel,
            temperature=self.server.temperature,
            deadline=self.server.deadline,
            max_bytes=self.server.max_bytes,
            max_tokens_name=self.server.max_tokens_name,
        )
        return ServedAnswerer(there, options)

    def load(self, dtype: torch.dtype, device: torch.device) -> NoReturn:
        """Raise `InputError`: a server does not provide weights."""
        raise InputError(
            f"{self.label} is behind a server, which gives only answers: pairs, ability and attacks by gradients need "
            "a model that is loaded here; leave them out"
        )

    @staticmethod
    def never() -> NoReturn:
        """Stand in for `load` where no answer is generated."""
        raise AssertionError("nothing is generated here")


def subject(
    text: str,
    *,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    server: ServerOptions | None = None,
) -> Subject | ServedSubject:
    """Parse a model's name: `[label=]name[@revision]`, or `[label=]http://…/v1[,http://…]#NAME`.

    Args:
        text: label and name. The name is a folder, a hub name, a `.ckpt` file of a run, `embedded`, or the address of a
            server, or of several servers of the same model. A revision is a git revision on the hub.
        trust_remote_code: run Python code that comes with the model.
        attn_implementation: attention implementation, as in transformers.
        server: options of the requests to a server.

    Raises:
        InputError: an address lacks a model, or a checkpoint is missing or was not written by `bdpo_pl.fit`.
    """
    if served := _SERVED.fullmatch(text):
        return _served(served["label"], served["url"], served["model"], server or ServerOptions())
    label, has_label, name = text.partition("=")
    # Checkpoints of `fit` have names such as best-step=75.ckpt, whose `=` does not end a label.
    if "/" in label or Path(text).expanduser().exists():
        has_label = ""
    name = name if has_label else text
    revision = None
    if not Path(name).expanduser().exists() and "@" in name:
        name, _, revision = name.rpartition("@")
    label = label if has_label else _short(name)
    if not label or not name:
        raise InputError(f"models: {text!r} names no model; give a folder, a hub name, a checkpoint or label=model")
    checkpoint = None
    if name.endswith(".ckpt"):
        checkpoint = Path(name).expanduser()
        saved = read_checkpoint(checkpoint)["bdpo_pl"]
        name, revision = saved["policy"], saved["revision"]
    elif name == EMBEDDED:
        name = str(embedded.MODEL_DIR)
    return Subject(label, ModelSource(name, revision, attn_implementation, trust_remote_code), checkpoint)


_SERVED = re.compile(r"(?:(?P<label>[^=/]+)=)?(?P<url>https?://[^#]+)(?:#(?P<model>.+))?")


def _served(label: str | None, url: str, model: str | None, server: ServerOptions) -> ServedSubject:
    check_urls(url, SERVER_NAMES)
    model = model or server.model
    if not model:
        raise InputError(
            f"models: {url} does not name one of the server's models; write {url}#NAME, or set server.model"
        )
    if ",http" in model:
        raise InputError(f"models: {url}#{model} names the model twice; write http://a/v1,http://b/v1#NAME")
    return ServedSubject(label or model.rpartition("/")[2], url, model, server)


def _short(name: str) -> str:
    """Return a name for reports; an exported model gets the name of its run."""
    parts = Path(name).parts
    if name.endswith(".ckpt") and len(parts) > 2:
        return f"{parts[-3]}/{Path(name).stem}"
    if len(parts) > 1 and parts[-1].startswith("model"):
        return parts[-2] if parts[-1] == "model" else f"{parts[-2]}/{parts[-1]}"
    return "/".join(parts[-2:]) if not Path(name).is_absolute() else parts[-1]


def newest_run(root: Path) -> Path | None:
    """Return the model folder exported by the newest run of the embedded model under `root`; None if there is none."""
    models = [path for path in root.glob("version_*/model*") if (path / "config.json").exists() and _aligns(path)]
    return max(models, key=lambda path: path.stat().st_mtime_ns, default=None)


def _aligns(model: Path) -> bool:
    """Return true if the run that exported `model` started from the embedded model."""
    try:
        config = yaml.safe_load((model.parent / "config.yaml").read_text(encoding="utf-8"))
        return config["model"]["policy"] in (EMBEDDED, str(embedded.MODEL_DIR))
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        return False
