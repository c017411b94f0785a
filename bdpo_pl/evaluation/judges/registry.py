"""Judges by name, as in `--judge NAME` and `judge: NAME`, and the construction of each from options.

A judge is anything with a `class_path` that is, or returns, a `bdpo_pl.evaluation.judges.judge.Judge`. A line in
`ALIASES` gives it a short name; a judge in a package of your own needs none. No weights are loaded before the first
query.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.chat.chat_model import ChatModel, Message
from bdpo_pl.evaluation.chat.completions import OptionNames
from bdpo_pl.evaluation.chat.endpoint import Endpoint, EndpointOptions
from bdpo_pl.evaluation.chat.local import LocalChat
from bdpo_pl.evaluation.judges.classifier import ClassifierJudge, Reads
from bdpo_pl.evaluation.judges.guard import LlamaGuardJudge, WildGuardJudge, encode_llama_guard, encode_wildguard
from bdpo_pl.evaluation.judges.local_guard import Encode, LocalGuard
from bdpo_pl.evaluation.judges.model_judge import check_threshold
from bdpo_pl.evaluation.judges.published.harmbench import HarmBenchJudge, HarmBenchMistralJudge
from bdpo_pl.evaluation.judges.published.jailbreakbench import JailbreakBenchJudge
from bdpo_pl.evaluation.judges.published.shieldgemma import POLICIES, ShieldGemmaJudge
from bdpo_pl.evaluation.judges.published.strongreject import (
    StrongRejectJudge,
    StrongRejectRubricJudge,
    encode_strongreject,
)
from bdpo_pl.evaluation.judges.published.whole_prompt import encode_whole
from bdpo_pl.evaluation.judges.rubric import ChatJudge
from bdpo_pl.models.loading import DTypeName, ModelSource, load_config, model_fingerprint
from bdpo_pl.models.precision import choose_device, choose_dtype

_HERE = "bdpo_pl.evaluation.judges"
ALIASES = {
    "phrases": f"{_HERE}.phrases.PhraseJudge",
    "learned": f"{_HERE}.learned.refusal_model.LearnedJudge",
    **{
        name: f"{_HERE}.registry.{name}"
        for name in (
            "classifier", "llama_guard", "wildguard", "chat", "harmbench", "harmbench_mistral", "jailbreakbench",
            "strongreject", "strongreject_rubric", "shieldgemma",
        )
    },
}  # fmt: skip
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
    """Build a judge that is a sequence classifier.

    Args:
        model: folder or hub name of the classifier.
        revision: git revision of the model on the hub; pin it to make a run repeatable.
        dtype: dtype of the weights; `auto`: bfloat16 on a GPU that supports it, otherwise float32.
        device: device, as in PyTorch. Default: the first GPU, otherwise the CPU.
        batch_size: number of exchanges judged at a time.
        trust_remote_code: run Python code that comes with the model. Off by default, because it runs with your
            permissions.
        refused_labels: labels that mean a refusal, as a list or `a,b`.
        unsafe_labels: labels that mean an unsafe answer, as a list or `a,b`.
        reads: input of the classifier: the `response` alone, or the `exchange`, prompt and response as a pair.
        max_length: maximum number of input tokens. Default: the limit of the model. Longer texts are truncated and
            counted.

    Raises:
        InputError: there is no such model, or it lacks these labels.
    """
    _check(batch_size=batch_size, max_length=max_length)
    source = _source(model, revision, trust_remote_code, "classifier", "a sequence classifier")
    chosen, place = _dtype_and_device(dtype, device)
    return ClassifierJudge(
        source,
        refused_labels=_listed(refused_labels),
        unsafe_labels=_listed(unsafe_labels),
        reads=reads,
        max_length=max_length,
        batch_size=batch_size,
        dtype=chosen,
        device=place,
        facts=_weights(source, chosen),
    )


def llama_guard(**options: Any) -> LlamaGuardJudge:
    """Build a judge that is a Llama Guard (2 to 4) or a similar model."""
    return _asking(LlamaGuardJudge, encode_llama_guard, "meta-llama/Llama-Guard-3-8B", **options)


def wildguard(**options: Any) -> WildGuardJudge:
    """Build a judge that is WildGuard."""
    return _asking(WildGuardJudge, encode_wildguard, "allenai/wildguard", **options)


def harmbench(**options: Any) -> HarmBenchJudge:
    """Build a judge that is HarmBench's Llama-2-13B classifier."""
    return _asking(HarmBenchJudge, encode_whole, "cais/HarmBench-Llama-2-13b-cls", **options)


def harmbench_mistral(**options: Any) -> HarmBenchMistralJudge:
    """Build a judge that is HarmBench's Mistral-7B classifier."""
    return _asking(HarmBenchMistralJudge, encode_whole, "cais/HarmBench-Mistral-7b-val-cls", **options)


def jailbreakbench(**options: Any) -> JailbreakBenchJudge:
    """Build a judge that is JailbreakBench's, a chat model."""
    return _asking(JailbreakBenchJudge, None, "meta-llama/Meta-Llama-3-70B-Instruct", **options)


def strongreject(unsafe_from: float = 0.5, **options: Any) -> StrongRejectJudge:
    """Build a judge that is StrongREJECT's fine-tuned model.

    Args:
        unsafe_from: minimum score of an unsafe answer.

    Raises:
        InputError: a number is out of range.
    """
    return _scoring(StrongRejectJudge, encode_strongreject, "qylu4156/strongreject-15k-v1", unsafe_from, **options)


def strongreject_rubric(unsafe_from: float = 0.5, **options: Any) -> StrongRejectRubricJudge:
    """Build a judge that is a chat model with StrongREJECT's rubric.

    Args:
        unsafe_from: minimum score of an unsafe answer.

    Raises:
        InputError: a number is out of range.
    """
    return _scoring(StrongRejectRubricJudge, None, "an instruction-tuned model", unsafe_from, **options)


def shieldgemma(policies: list[str] | str = "all", unsafe_from: float = 0.5, **options: Any) -> ShieldGemmaJudge:
    """Build a judge that is ShieldGemma.

    Args:
        policies: policies that an answer may violate, as a list or `a,b`: `dangerous`, `harassment`, `hate`, `sexual`,
            or `all`. The model is asked once about each.
        unsafe_from: minimum score of an unsafe answer.

    Raises:
        InputError: there is no such policy, or a number is out of range.
    """
    check_threshold(unsafe_from)
    judge = _asking(ShieldGemmaJudge, encode_whole, "google/shieldgemma-2b", **options)
    judge.choose(list(POLICIES) if policies == "all" else _listed(policies), unsafe_from)
    return judge


def chat(unsafe_from: float = 0.5, **options: Any) -> ChatJudge:
    """Build a judge that is any chat model, which grades by a rubric.

    Args:
        unsafe_from: minimum score of an unsafe answer.

    Raises:
        InputError: a number is out of range.
    """
    return _scoring(ChatJudge, None, "an instruction-tuned model", unsafe_from, **options)


class _Later:
    """A chat model that is loaded on the first call."""

    def __init__(self, name: str, load: Callable[[], ChatModel]) -> None:
        self.name = name
        self._load = load
        self._model: ChatModel | None = None

    def reply(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """Return the replies of the model."""
        if self._model is None:
            self._model = self._load()
        return self._model.reply(conversations)


def _scoring(kind: type[Any], encode: Encode | None, example: str, unsafe_from: float, **options: Any) -> Any:
    """Build a judge that is a language model and gives scores; see `_asking`."""
    check_threshold(unsafe_from)
    judge = _asking(kind, encode, example, **options)
    judge.set_threshold(unsafe_from)
    return judge


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
        kind: class of the judge.
        encode: function that puts a conversation into the form of a model that is loaded here; None: its chat template
            is used.
        example: example of a suitable model, for messages.
        model: folder or hub name of a model to load here.
        revision: git revision of the model on the hub; pin it to make a run repeatable.
        endpoint: endpoint of the model, instead of loading one.
        dtype: dtype of a loaded model's weights; `auto`: bfloat16 on a GPU that supports it, otherwise float32.
        device: device of a loaded model, as in PyTorch. Default: the first GPU, otherwise the CPU.
        batch_size: number of exchanges that a loaded model judges at a time.
        max_new_tokens: maximum number of tokens in a loaded model's answer. Default: 32 where a word or a line
            is asked for, otherwise 512.
        trust_remote_code: run Python code that comes with the model. Off by default, because it runs with your
            permissions.
        attempts: maximum number of queries about one exchange, until an answer has the required form. A guard or
            classifier that is loaded here is asked once, because it would repeat its answer.

    Raises:
        InputError: options contradict each other, or the model is not available.
    """
    _check(batch_size=batch_size, max_new_tokens=max_new_tokens, attempts=attempts)
    name = kind.name
    if endpoint is not None:
        if model:
            raise InputError("judge.model is loaded here and judge.endpoint is elsewhere: leave out one of them")
        loaded = {
            "revision": revision, "dtype": dtype, "device": device, "batch_size": batch_size,
            "max_new_tokens": max_new_tokens, "trust_remote_code": trust_remote_code,
        }  # fmt: skip
        if unread := [f"judge.{option}" for option, value in loaded.items() if value != _default(option)]:
            raise InputError(
                f"judge.endpoint is elsewhere, and only a model that is loaded here reads {', '.join(unread)}: leave "
                "out one or the other (an endpoint has judge.endpoint.max_tokens and .parallel)"
            )
        there = Endpoint(endpoint, names=OptionNames("judge.endpoint"))
        return kind(there, there.facts(), attempts)
    if encode is not None and attempts not in (1, _default("attempts")):
        raise InputError(
            f"judge.attempts is {attempts}, but judge {name} is asked once if it is loaded here: decoding is greedy, "
            "so it would repeat its answer; leave it out"
        )
    source = _source(model, revision, trust_remote_code, name, example, " or judge.endpoint")
    chosen, place = _dtype_and_device(dtype, device)
    tokens = max_new_tokens or kind.new_tokens
    facts = {**_weights(source, chosen), "max_new_tokens": str(tokens)}
    if encode is not None:
        guard = LocalGuard(
            source, encode, dtype=chosen, device=place, batch_size=batch_size, max_new_tokens=tokens
        )  # fmt: skip
        return kind(guard, facts, 1)
    later = _Later(
        source.name, lambda: LocalChat.load(source, chosen, place, max_new_tokens=tokens, batch_size=batch_size)
    )
    return kind(later, facts, attempts)


def _default(option: str) -> object:
    """Return the default of an option of `_asking`."""
    return inspect.signature(_asking).parameters[option].default


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
    except InputError as error:  # the message refers to the evaluated model
        raise InputError(f"judge.model: {error}".replace("set model.trust", "set judge.trust")) from error
    return source


def _weights(source: ModelSource, dtype: torch.dtype) -> dict[str, str]:
    return {"weights": model_fingerprint(source), "dtype": str(dtype).removeprefix("torch.")}


def _dtype_and_device(dtype: str, device: str | None) -> tuple[torch.dtype, torch.device]:
    place = choose_device(device or "auto", "judge.device")
    return choose_dtype(dtype, place, "judge.dtype"), place
