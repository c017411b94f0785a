"""Judges by name: what `--judge NAME` and `judge: NAME` stand for, and how each is built from options.

A judge is anything with a `class_path` that is, or gives, a `bdpo_pl.evaluation.judges.judge.Judge`. One line in
`ALIASES` makes a short name of it; a judge in a package of your own needs none. Nothing is loaded before a judge is
first asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.chat.chat_model import ChatModel, Message
from bdpo_pl.evaluation.chat.endpoint import Endpoint, EndpointOptions
from bdpo_pl.evaluation.chat.local import LocalChat
from bdpo_pl.evaluation.judges import published
from bdpo_pl.evaluation.judges.classifier import ClassifierJudge, Reads
from bdpo_pl.evaluation.judges.guard import LlamaGuardJudge, WildGuardJudge, encode_llama_guard, encode_wildguard
from bdpo_pl.evaluation.judges.local_guard import Encode, LocalGuard
from bdpo_pl.evaluation.judges.rubric import ChatJudge
from bdpo_pl.models.loading import DTypeName, ModelSource, load_config, model_fingerprint

_HERE = "bdpo_pl.evaluation.judges"
ALIASES = {
    "phrases": f"{_HERE}.phrases.PhraseJudge",
    "learned": f"{_HERE}.learned.refusal_model.LearnedJudge",
    **{
        name: f"{_HERE}.registry.{name}"
        for name in ("classifier", "llama_guard", "wildguard", "chat", "harmbench", "shieldgemma")
    },
}
"""Short name → class path."""


def classifier(
    model: str | None = None,
    revision: str | None = None,
    dtype: DTypeName = "auto",
    device: str | None = None,
    batch_size: int = 16,
    trust_remote_code: bool = False,
    refused_labels: list[str] | str = (),  # type: ignore[assignment]
    unsafe_labels: list[str] | str = (),  # type: ignore[assignment]
    reads: Reads = "response",
    max_length: int | None = None,
) -> ClassifierJudge:
    """Build a judge of a sequence classifier.

    Args:
        model: folder or hub name of the classifier.
        revision: git revision of the model on the hub; pin it to make a run repeatable.
        dtype: of the weights; `auto`: bfloat16 on a GPU, else float32.
        device: as in PyTorch; default the first GPU, else the CPU.
        batch_size: exchanges judged at a time.
        trust_remote_code: run Python code that comes with the model. Off by default: it runs with your permissions.
        refused_labels: labels that mean a refusal, as a list or `a,b`.
        unsafe_labels: labels that mean an unsafe answer, likewise.
        reads: what it reads: the `response` alone, or the `exchange`, prompt and response as a pair.
        max_length: tokens that it reads; default what it has room for. Longer texts are cut and counted.

    Raises:
        InputError: no such model, or not those labels.
    """
    _check(batch_size=batch_size, max_length=max_length)
    source = _source(model, revision, trust_remote_code, "classifier", "a sequence classifier")
    return ClassifierJudge(
        source,
        refused_labels=_listed(refused_labels),
        unsafe_labels=_listed(unsafe_labels),
        reads=reads,
        max_length=max_length,
        batch_size=batch_size,
        dtype=_dtype(dtype, device),
        device=_device(device),
        facts=_weights(source, dtype, device),
    )


def llama_guard(**options: Any) -> LlamaGuardJudge:
    """Build a judge of a Llama Guard (2 to 4) or the like."""
    return _asking(LlamaGuardJudge, encode_llama_guard, "meta-llama/Llama-Guard-3-8B", **options)


def wildguard(**options: Any) -> WildGuardJudge:
    """Build a judge of WildGuard."""
    return _asking(WildGuardJudge, encode_wildguard, "allenai/wildguard", **options)


def harmbench(**options: Any) -> published.HarmBenchJudge:
    """Build a judge of HarmBench's Llama-2-13B classifier."""
    return _asking(
        published.HarmBenchJudge, published.encode_whole, "cais/HarmBench-Llama-2-13b-cls", **options
    )  # fmt: skip


def shieldgemma(**options: Any) -> published.ShieldGemmaJudge:
    """Build a judge of ShieldGemma."""
    return _asking(published.ShieldGemmaJudge, published.encode_whole, "google/shieldgemma-2b", **options)


def chat(unsafe_from: float = 0.5, **options: Any) -> ChatJudge:
    """Build a judge of any chat model, which grades by a rubric.

    Args:
        unsafe_from: score from which an answer is unsafe.

    Raises:
        InputError: a number out of range.
    """
    if not 0.0 < unsafe_from <= 1.0:
        raise InputError(f"judge.unsafe_from must be above 0 and at most 1, got {unsafe_from}")
    judge = _asking(ChatJudge, None, "an instruction-tuned model", **options)
    judge.set_threshold(unsafe_from)
    return judge


class _Later:
    """A chat model that is loaded when it is first asked."""

    def __init__(self, name: str, load: Callable[[], ChatModel]) -> None:
        self.name = name
        self._load = load
        self._model: ChatModel | None = None

    def reply(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """The model's."""
        if self._model is None:
            self._model = self._load()
        return self._model.reply(conversations)


def _asking(
    kind: type[Any],
    encode: Encode | None,
    example: str,
    model: str | None = None,
    revision: str | None = None,
    endpoint: EndpointOptions | None = None,
    dtype: DTypeName = "auto",
    device: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    trust_remote_code: bool = False,
    attempts: int = 3,
) -> Any:
    """Build a judge that is a language model.

    Args:
        kind: the judge.
        encode: puts a conversation into the form of a model that is loaded here; None: its chat template does.
        example: a model of that kind, for messages.
        model: folder or hub name of a model to load here.
        revision: git revision of the model on the hub; pin it to make a run repeatable.
        endpoint: where the model is spoken to instead of loading one.
        dtype: of a loaded model's weights; `auto`: bfloat16 on a GPU, else float32.
        device: of a loaded model, as in PyTorch; default the first GPU, else the CPU.
        batch_size: exchanges a loaded model judges at a time.
        max_new_tokens: tokens in a loaded model's answer at most; default 32 for guards, 512 for `chat`.
        trust_remote_code: run Python code that comes with the model. Off by default: it runs with your permissions.
        attempts: how often the model is asked about one exchange, until its answer has the form.

    Raises:
        InputError: options that do not go together, or a model that is not to be had.
    """
    _check(batch_size=batch_size, max_new_tokens=max_new_tokens, attempts=attempts)
    name = kind.name
    if endpoint is not None:
        if model:
            raise InputError("judge.model is loaded here and judge.endpoint is elsewhere: leave out one of them")
        there = Endpoint(endpoint)
        return kind(there, {"endpoint": there.url}, attempts)
    source = _source(model, revision, trust_remote_code, name, example, " or judge.endpoint")
    facts = _weights(source, dtype, device)
    chosen, place = _dtype(dtype, device), _device(device)
    if encode is not None:
        tokens = max_new_tokens or 32
        guard = LocalGuard(
            source, encode, dtype=chosen, device=place, batch_size=batch_size, max_new_tokens=tokens
        )  # fmt: skip
        # Greedy, and asked the same again it says the same again.
        return kind(guard, facts, 1)
    tokens = max_new_tokens or 512
    later = _Later(
        source.name, lambda: LocalChat.load(source, chosen, place, max_new_tokens=tokens, batch_size=batch_size)
    )
    return kind(later, facts, attempts)


def _check(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise InputError(f"judge.{name} must be at least 1, got {value}")


def _listed(labels: Sequence[str] | str) -> list[str]:
    return labels.split(",") if isinstance(labels, str) else list(labels)


def _source(
    model: str | None, revision: str | None, trust_remote_code: bool, name: str, example: str, also: str = ""
) -> ModelSource:
    if not model:
        raise InputError(f"judge {name} needs a model: give judge.model{also}, as {example}")
    source = ModelSource(model, revision, trust_remote_code=trust_remote_code)
    try:
        load_config(source)
    except InputError as error:  # it speaks of the model that is judged
        raise InputError(f"judge.model: {error}".replace("set model.trust", "set judge.trust")) from error
    return source


def _weights(source: ModelSource, dtype: str, device: str | None) -> dict[str, str]:
    return {"weights": model_fingerprint(source), "dtype": str(_dtype(dtype, device)).removeprefix("torch.")}


def _device(device: str | None) -> torch.device:
    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InputError(f"judge.device {device!r}: {error}") from None


def _dtype(dtype: str, device: str | None) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.bfloat16 if _device(device).type == "cuda" else torch.float32
