"""Greedy Coordinate Gradient (Zou et al., arXiv:2307.15043): a suffix that makes a model begin with "Sure, here is …".

Each step takes the gradient of the loss by the suffix's one-hot tokens, draws single-token swaps among the most
promising ones, and goes on from the one of least loss. The attack needs the model's gradients, and one prompt takes
steps × search_width forward passes. No key/value cache of the prefix is kept.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.attacks.attack import (
    Attack,
    AttackResult,
    Attempted,
    Progress,
    StateFile,
    Target,
    attacked,
    steps_of,
)
from bdpo_pl.evaluation.attacks.suffixes import SuffixPrompt, allowed_tokens, draw
from bdpo_pl.evaluation.attacks.target_loss import TargetLoss
from bdpo_pl.evaluation.attacks.targets import default_target
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt
from bdpo_pl.forward.equivalence import evaluating

NAME = "gcg"


@dataclass
class GCGOptions:
    """How long and how widely to search.

    Args:
        steps: for each prompt, at most.
        search_width: swaps drawn in a step.
        topk: tokens at each place of the suffix to draw from, by gradient.
        suffix: to begin with; its length in tokens stays.
        batch_size: swaps in a forward pass; lower it where memory runs out.
        ascii_only: suffixes of printable ASCII alone.
        stop_on_match: stop when the greedy answer begins with the target.
        stop_loss: stop at a loss of no more than this, in nats per token of the target; null: go on.
        seed: of the draws.
        save_every: steps after which the state is written.

    Raises:
        InputError: a value out of range.
    """

    steps: int = 250
    search_width: int = 512
    topk: int = 256
    suffix: str = "! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! !"
    batch_size: int = 64
    ascii_only: bool = True
    stop_on_match: bool = True
    stop_loss: float | None = None
    seed: int = 0
    save_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "search_width", "topk", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"gcg.{name} must be at least 1, got {getattr(self, name)}")
        if not self.suffix.strip():
            raise InputError("gcg.suffix is empty; give a few words or signs, whose number of tokens is kept")
        if self.stop_loss is not None and not self.stop_loss >= 0.0:
            raise InputError(f"gcg.stop_loss must be at least 0, or null, got {self.stop_loss}")


class GCGAttack(Attack):
    """The search, on a model that is loaded here.

    Args:
        options: how long and how widely to search.
    """

    name = NAME

    def __init__(self, options: GCGOptions | None = None) -> None:
        self._options = options or GCGOptions()

    def run(self, prompts: Sequence[EvaluationPrompt], target: Target, step: Callable[[], None]) -> Attempted:
        """Find a suffix for each prompt.

        Raises:
            InputError: the model is behind an endpoint, or a prompt cannot be attacked.
        """
        if target.local is None:
            raise InputError(f"gcg needs the gradients of {target.name}, which an endpoint does not give; leave it out")
        found = list(
            results(
                prompts,
                *target.local,
                self._options,
                use_template=target.use_template,
                folder=target.folder,
                on_progress=lambda done, total: step(),
            )
        )
        matched = sum(bool(result.details["matched"]) for result in found)
        cost = f"{steps_of(found)} of {self._options.search_width} swaps each; {matched} answers began with the target"
        return Attempted([result.prompt for result in found], cost)


@dataclass
class _State:
    """Where the search on one prompt stands."""

    suffix: list[int]
    best: list[int]
    best_loss: float
    initial_loss: float
    matched: bool
    steps: int = 0
    drawn: int = 0
    survived: int = 0


def attack(
    prompts: Sequence[EvaluationPrompt],
    model: Any,
    tokenizer: Any,
    options: GCGOptions,
    *,
    use_template: bool = True,
    folder: Path | None = None,
    on_progress: Progress | None = None,
) -> list[EvaluationPrompt]:
    """`prompts`, each with the best suffix that was found; `results` tells more."""
    found = results(
        prompts, model, tokenizer, options, use_template=use_template, folder=folder, on_progress=on_progress
    )
    return [result.prompt for result in found]


def results(
    prompts: Sequence[EvaluationPrompt],
    model: Any,
    tokenizer: Any,
    options: GCGOptions,
    *,
    use_template: bool = True,
    folder: Path | None = None,
    on_progress: Progress | None = None,
) -> Iterator[AttackResult]:
    """Attack one prompt after the other.

    Args:
        prompts: each with its target, or else with `default_target`'s.
        model: a transformers causal language model on its device.
        tokenizer: the model's.
        options: of the search.
        use_template: put each prompt into the tokenizer's chat template, if it has one.
        folder: where the state of each prompt is kept, under a warning; an attack that was cut off goes on from there
            to the same end, where the device computes the same twice. None: nothing is written.
        on_progress: told after each prompt.

    Yields:
        Of each prompt in order: `details` has `suffix`, `target`, `loss`, `initial_loss`, `matched` (whether the
        greedy answer begins with the target) and `survived` (the share of drawn swaps that could be tokenised again).

    Raises:
        InputError: a prompt that cannot be attacked, or a state file that is damaged.
    """
    allowed = allowed_tokens(tokenizer, model.get_input_embeddings().weight.shape[0], ascii_only=options.ascii_only)
    weights = None if folder is None else _weights_digest(model)
    # All of them first: a prompt that cannot be attacked is found out before hours of work.
    searches = [_Search.of(prompt, model, tokenizer, options, use_template) for prompt in prompts]
    with evaluating(model):
        for done, search in enumerate(searches, start=1):
            file = None if folder is None else StateFile(folder, NAME, _facts(search, options, weights))
            yield _run(search, options, allowed, file)
            if on_progress is not None:
                on_progress(done, len(searches))


@dataclass(frozen=True)
class _Search:
    """One prompt, ready to be attacked."""

    prompt: EvaluationPrompt
    target: str
    place: SuffixPrompt
    loss: TargetLoss

    @classmethod
    def of(
        cls, prompt: EvaluationPrompt, model: Any, tokenizer: Any, options: GCGOptions, use_template: bool
    ) -> _Search:
        target = prompt.target or default_target(prompt.behaviour)
        ids = tokenizer(target, add_special_tokens=False, verbose=False)["input_ids"]
        try:
            place = SuffixPrompt(tokenizer, prompt.text, options.suffix, use_template=use_template)
            loss = TargetLoss(model, place.before, place.after, ids, options.batch_size)
            loss.check_length(len(place.initial))
        except InputError as error:
            raise InputError(f"{prompt.place or repr(prompt.text[:60])}: {error}") from None
        return cls(prompt, target, place, loss)


def _run(search: _Search, options: GCGOptions, allowed: Tensor, file: StateFile | None) -> AttackResult:
    state = _read(file) or _begin(search)
    while state.steps < options.steps and not _reached(state, options):
        _step(state, search, allowed, options)
        if file is not None and state.steps % options.save_every == 0:
            file.write([asdict(state)])
    if file is not None:
        file.write([asdict(state)])
    text = search.place.text(state.best)
    details = {
        "suffix": text[len(search.prompt.text.rstrip()) :],
        "target": search.target,
        "loss": state.best_loss,
        "initial_loss": state.initial_loss,
        "matched": state.matched,
        "survived": state.survived / state.drawn if state.drawn else 1.0,
    }
    return AttackResult(attacked(search.prompt, text, NAME), state.steps, details)


def _begin(search: _Search) -> _State:
    suffix = search.place.initial
    losses, matches = search.loss.of(torch.tensor([suffix]))
    loss = float(losses[0])
    if not math.isfinite(loss):
        where = search.prompt.place or repr(search.prompt.text[:60])
        raise InputError(f"{where}: the model's loss is {loss}; load it in float32 or bfloat16")
    return _State(suffix, suffix, loss, loss, bool(matches[0]))


def _step(state: _State, search: _Search, allowed: Tensor, options: GCGOptions) -> None:
    """One step of the search, drawn by (seed, request, step) alone, so that it is the same after an interruption."""
    digest = hashlib.sha256(f"{options.seed}|{state.steps}|{search.prompt.text}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    current = torch.tensor(state.suffix)
    drawn = draw(current, search.loss.gradient(current), allowed, options.topk, options.search_width, generator)
    kept = (
        [swap for swap, survives in zip(drawn, search.place.survive(drawn), strict=True) if survives] if drawn else []
    )
    state.steps += 1
    state.drawn += len(drawn)
    state.survived += len(kept)
    if not kept:
        return
    losses, matches = search.loss.of(torch.tensor(kept))
    # One that reaches the target goes before one of less loss.
    if options.stop_on_match and matches.any():
        losses = losses.where(matches, torch.inf)
    i = int(losses.argmin())
    state.suffix = kept[i]
    if losses[i] < state.best_loss or (options.stop_on_match and matches[i]):
        state.best, state.best_loss, state.matched = kept[i], float(losses[i]), bool(matches[i])


def _reached(state: _State, options: GCGOptions) -> bool:
    return (options.stop_on_match and state.matched) or (
        options.stop_loss is not None and state.best_loss <= options.stop_loss
    )


def _read(file: StateFile | None) -> _State | None:
    lines = [] if file is None else file.read()
    if not lines:
        return None
    try:
        (line,) = lines
        return _State(**line)
    except (TypeError, ValueError):
        assert file is not None
        raise file.damaged() from None


def _facts(search: _Search, options: GCGOptions, weights: str | None) -> dict[str, Any]:
    """What a search depends on."""
    chosen = {name: value for name, value in asdict(options).items() if name not in ("batch_size", "save_every")}
    return {
        "prompt": search.prompt.text,
        "ids": [search.place.before, search.place.after],
        "target": search.target,
        "options": chosen,
        "weights": weights,
    }


def _weights_digest(model: Any) -> str:
    """What tells a model from one with other weights: a digest over some of each parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        index = torch.linspace(0, flat.numel() - 1, min(64, flat.numel()), dtype=torch.float64).long()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(flat[index.to(flat.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()
