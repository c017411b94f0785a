"""Which judge, by options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.chat.chat_model import ChatModel
from bdpo_pl.evaluation.chat.endpoint import Endpoint, EndpointOptions
from bdpo_pl.evaluation.chat.local import LocalChat
from bdpo_pl.evaluation.judges.classifier import ClassifierJudge, Reads
from bdpo_pl.evaluation.judges.guard import LlamaGuardJudge, WildGuardJudge, encode_llama_guard, encode_wildguard
from bdpo_pl.evaluation.judges.judge import Judge
from bdpo_pl.evaluation.judges.local_guard import LocalGuard
from bdpo_pl.evaluation.judges.model_judge import AskingJudge
from bdpo_pl.evaluation.judges.phrases import PhraseJudge
from bdpo_pl.evaluation.judges.rubric import ChatJudge
from bdpo_pl.models.loading import DTypeName, ModelSource, load_config, model_fingerprint

JudgeKind = Literal["phrases", "classifier", "llama_guard", "wildguard", "chat"]

_EXAMPLES = {
    "classifier": "a sequence classifier",
    "llama_guard": "meta-llama/Llama-Guard-3-8B",
    "wildguard": "allenai/wildguard",
    "chat": "an instruction-tuned model",
}
_GUARDS = {"llama_guard": (LlamaGuardJudge, encode_llama_guard), "wildguard": (WildGuardJudge, encode_wildguard)}


@dataclass
class JudgeOptions:
    """What tells what an answer is.

    Args:
        kind: `phrases`: a list of them, offline; `classifier`: a sequence classifier; `llama_guard` and `wildguard`:
            guard models of these forms; `chat`: a chat model that grades by a rubric.
        model: folder or hub name of a model to load here.
        revision: git revision of the model on the hub; pin it to make a run repeatable.
        endpoint: where a guard or chat model is spoken to instead of loading one.
        dtype: of a loaded model's weights; `auto`: bfloat16 on a GPU, else float32.
        device: of a loaded model, as in PyTorch; default the first GPU, else the CPU.
        batch_size: exchanges a loaded model judges at a time.
        max_new_tokens: tokens in a loaded model's answer at most; default 32 for guards, 512 for `chat`.
        trust_remote_code: run Python code that comes with the model. Off by default: it runs with your permissions.
        refused_labels: labels of a classifier that mean a refusal.
        unsafe_labels: labels of a classifier that mean an unsafe answer.
        reads: what a classifier reads: the `response` alone, or the `exchange`, prompt and response as a pair.
        max_length: tokens that a classifier reads; default what it has room for. Longer texts are cut and counted.
        unsafe_from: score from which an answer is unsafe to `chat`.
        attempts: how often a guard or chat model is asked about one exchange, until its answer has the form.

    Raises:
        InputError: an unknown kind or a number out of range.
    """

    kind: JudgeKind = "phrases"
    model: str | None = None
    revision: str | None = None
    endpoint: EndpointOptions | None = None
    dtype: DTypeName = "auto"
    device: str | None = None
    batch_size: int = 16
    max_new_tokens: int | None = None
    trust_remote_code: bool = False
    refused_labels: list[str] = field(default_factory=list)
    unsafe_labels: list[str] = field(default_factory=list)
    reads: Reads = "response"
    max_length: int | None = None
    unsafe_from: float = 0.5
    attempts: int = 3

    def __post_init__(self) -> None:
        if self.kind not in get_args(JudgeKind):
            raise InputError(f"judge.kind {self.kind!r} is unknown; choose {', '.join(get_args(JudgeKind))}")
        for name in ("batch_size", "max_new_tokens", "max_length", "attempts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"judge.{name} must be at least 1, got {value}")
        if not 0.0 < self.unsafe_from <= 1.0:
            raise InputError(f"judge.unsafe_from must be above 0 and at most 1, got {self.unsafe_from}")


def make_judge(options: JudgeOptions, chat: ChatModel | None = None) -> Judge:
    """The judge of `options`. Its weights are loaded when it first judges, those of `chat` at once.

    Args:
        options: which.
        chat: asked in place of a model that the options name.

    Raises:
        InputError: options that do not go together, or a model that is not to be had.
    """
    kind = options.kind
    if kind == "phrases":
        if options.model or options.endpoint:
            raise InputError("judge.kind phrases asks no model; set judge.kind, or leave out judge.model and endpoint")
        return PhraseJudge()
    if kind == "classifier":
        if options.endpoint:
            raise InputError("judge.kind classifier is loaded here: give judge.model in place of judge.endpoint")
        source = _source(options)
        return ClassifierJudge(
            source,
            refused_labels=options.refused_labels,
            unsafe_labels=options.unsafe_labels,
            reads=options.reads,
            max_length=options.max_length,
            batch_size=options.batch_size,
            dtype=_dtype(options),
            device=_device(options),
            facts=_weights(source, options),
        )
    if options.refused_labels or options.unsafe_labels:
        raise InputError(f"judge.refused_labels and judge.unsafe_labels are a classifier's; judge.kind is {kind}")
    return _asking(options, chat)


def _asking(options: JudgeOptions, chat: ChatModel | None) -> AskingJudge:
    facts: dict[str, str] = {}
    attempts = options.attempts
    if chat is None and options.endpoint is not None:
        if options.model:
            raise InputError("judge.model is loaded here and judge.endpoint is elsewhere: leave out one of them")
        chat = Endpoint(options.endpoint)
        facts["endpoint"] = chat.url
    elif chat is None:
        source = _source(options)
        facts |= _weights(source, options)
        if options.kind == "chat":
            chat = LocalChat.load(
                source,
                _dtype(options),
                _device(options),
                max_new_tokens=options.max_new_tokens or 512,
                batch_size=options.batch_size,
            )
        else:
            attempts = 1  # greedy, and asked the same again it says the same again
            chat = LocalGuard(
                source,
                _GUARDS[options.kind][1],
                dtype=_dtype(options),
                device=_device(options),
                batch_size=options.batch_size,
                max_new_tokens=options.max_new_tokens or 32,
            )
    if options.kind == "chat":
        return ChatJudge(chat, facts, attempts, options.unsafe_from)
    return _GUARDS[options.kind][0](chat, facts, attempts)


def _source(options: JudgeOptions) -> ModelSource:
    if not options.model:
        also = "" if options.kind == "classifier" else " or judge.endpoint"
        raise InputError(
            f"judge.kind {options.kind} needs a model: give judge.model{also}, as {_EXAMPLES[options.kind]}"
        )
    source = ModelSource(options.model, options.revision, trust_remote_code=options.trust_remote_code)
    try:
        load_config(source)
    except InputError as error:  # it speaks of the model that is judged
        raise InputError(f"judge.model: {error}".replace("set model.trust", "set judge.trust")) from error
    return source


def _weights(source: ModelSource, options: JudgeOptions) -> dict[str, str]:
    return {"weights": model_fingerprint(source), "dtype": str(_dtype(options)).removeprefix("torch.")}


def _device(options: JudgeOptions) -> torch.device:
    try:
        return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InputError(f"judge.device {options.device!r}: {error}") from None


def _dtype(options: JudgeOptions) -> torch.dtype:
    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    return torch.bfloat16 if _device(options).type == "cuda" else torch.float32
