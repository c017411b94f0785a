"""Greedy Coordinate Gradient (Zou et al., arXiv:2307.15043): a suffix that makes a model begin with "Sure, here is …".

Each step computes the gradient of the loss with respect to the suffix's one-hot tokens, draws single-token swaps among
the most promising ones, and continues from the swap with the lowest loss. The attack needs the model's gradients. One
prompt takes steps × search_width forward passes. No key/value cache of the prefix is kept.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdpo_pl.data.tokenizer_like import TokenizerLike
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
from bdpo_pl.evaluation.attacks.budget import Budget
from bdpo_pl.evaluation.attacks.suffixes import SuffixPrompt, allowed_tokens, draw
from bdpo_pl.evaluation.attacks.target_loss import TargetLoss
from bdpo_pl.evaluation.attacks.targets import default_target
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt
from bdpo_pl.forward.equivalence import evaluating
from bdpo_pl.models.causal_lm import CausalLM

NAME = "gcg"


@dataclass
class GCGOptions:
    """Length and width of the search.

    Args:
        steps: maximum number of steps for each prompt.
        search_width: number of swaps drawn in each step.
        topk: number of tokens to draw from at each position of the suffix, ranked by gradient.
        suffix: initial suffix; its length in tokens does not change.
        batch_size: number of swaps in a forward pass; lower it if memory runs out.
        ascii_only: restrict suffixes to printable ASCII.
        stop_on_match: stop when the greedy answer begins with the target.
        stop_loss: stop at a loss of no more than this, in nats per token of the target; null: do not stop.
        seed: seed of the draws.
        save_every: number of steps between writes of the state.

    Raises:
        InputError: a value is out of range.
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
    """GCG on a model that is loaded here.

    Args:
        options: length and width of the search.
    """

    name = NAME

    def __init__(self, options: GCGOptions | None = None) -> None:
        self._options = options or GCGOptions()

    def check(self, budget: Budget) -> None:
        """Raise `InputError` if `budget` does not suffice for one step."""
        self._steps(budget)

    def _steps(self, budget: Budget) -> int:
        return budget.steps(self._options.steps, self._options.search_width, NAME)

    def run(self, prompts: Sequence[EvaluationPrompt], target: Target, step: Callable[[], None]) -> Attempted:
        """Find a suffix for each prompt.

        Raises:
            InputError: the model is behind an endpoint, or a prompt cannot be attacked.
        """
        if target.local is None:
            raise InputError(f"gcg needs the gradients of {target.name}, which an endpoint does not give; leave it out")
        limit = self._steps(target.budget)
        found = list(
            results(
                prompts,
                *target.local,
                replace(self._options, steps=limit),
                use_template=target.use_template,
                folder=target.folder,
                on_progress=lambda done, total: step(),
                over=target.budget.over,
                fits=target.fits,
            )
        )
        matched = sum(bool(result.details["matched"]) for result in found)
        cost = f"{steps_of(found)} of {self._options.search_width} swaps each; {matched} answers began with the target"
        return Attempted([result.prompt for result in found], cost)


@dataclass
class _State:
    """State of the search on one prompt."""

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
    model: CausalLM,
    tokenizer: TokenizerLike,
    options: GCGOptions,
    *,
    use_template: bool = True,
    folder: Path | None = None,
    on_progress: Progress | None = None,
) -> list[EvaluationPrompt]:
    """Return `prompts`, each with the best suffix that was found; `results` returns more details."""
    found = results(
        prompts, model, tokenizer, options, use_template=use_template, folder=folder, on_progress=on_progress
    )
    return [result.prompt for result in found]


def results(
    prompts: Sequence[EvaluationPrompt],
    model: CausalLM,
    tokenizer: TokenizerLike,
    options: GCGOptions,
    *,
    use_template: bool = True,
    folder: Path | None = None,
    on_progress: Progress | None = None,
    over: Callable[[], bool] = lambda: False,
    fits: Callable[[str], bool] = lambda prompt: True,
) -> Iterator[AttackResult]:
    """Attack one prompt after the other.

    Args:
        prompts: prompts to attack, each with its target; without one, `default_target` of its request is used.
        model: a transformers causal language model on its device.
        tokenizer: the model's tokenizer.
        options: options of the search.
        use_template: put each prompt into the tokenizer's chat template, if it has one.
        folder: folder for the state of each prompt, saved under a warning. An interrupted attack resumes from it and
            reaches the same result, if the device is deterministic. None: no state is saved.
        on_progress: function called after each prompt.
        over: function that returns whether the attack must end now.
        fits: function that returns whether a prompt and an answer fit into the model's window.

    Yields:
        The result of each prompt, in order, until the attack must end: `details` has `suffix`, `target`, `loss`,
        `initial_loss`, `matched` (whether the greedy answer begins with the target) and `survived` (the share of drawn
        swaps that survive tokenisation).

    Raises:
        InputError: a prompt cannot be attacked, or a state file is damaged.
    """
    allowed = allowed_tokens(tokenizer, model.get_input_embeddings().weight.shape[0], ascii_only=options.ascii_only)
    weights = None if folder is None else _weights_digest(model)
    # All prompts are prepared first, so that one that cannot be attacked is reported before hours of work.
    searches = [_Search.of(prompt, model, tokenizer, options, use_template) for prompt in prompts]
    for search in searches:
        search.check_room(fits)
    with evaluating(model):
        for done, search in enumerate(searches, start=1):
            if over():
                return
            file = None if folder is None else StateFile(folder, NAME, _facts(search, options, weights))
            yield _run(search, options, allowed, file, over)
            if on_progress is not None:
                on_progress(done, len(searches))


@dataclass(frozen=True)
class _Search:
    """One prompt, prepared for the attack."""

    prompt: EvaluationPrompt
    target: str
    place: SuffixPrompt
    loss: TargetLoss

    @classmethod
    def of(
        cls,
        prompt: EvaluationPrompt,
        model: CausalLM,
        tokenizer: TokenizerLike,
        options: GCGOptions,
        use_template: bool,
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

    def check_room(self, fits: Callable[[str], bool]) -> None:
        """Raise `InputError` if the prompt with its suffix, which keeps its length, leaves no room for an answer."""
        if not fits(self.place.text(self.place.initial)):
            raise InputError(
                f"{self.where}: with its suffix and an answer it does not fit into the model's window; lower "
                "generation.max_new_tokens, shorten gcg.suffix, or leave the prompt out"
            )

    @property
    def where(self) -> str:
        """Place of the prompt, for messages."""
        return self.prompt.place or repr(self.prompt.text[:60])


def _run(
    search: _Search, options: GCGOptions, allowed: Tensor, file: StateFile | None, over: Callable[[], bool]
) -> AttackResult:
    state = _read(file) or _begin(search)
    while state.steps < options.steps and not _reached(state, options) and not over():
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
        raise InputError(_no_loss(search, str(loss)))
    return _State(suffix, suffix, loss, loss, bool(matches[0]))


def _no_loss(search: _Search, loss: str) -> str:
    return f"{search.where}: the model's loss is {loss}; load it in float32 or bfloat16"


def _step(state: _State, search: _Search, allowed: Tensor, options: GCGOptions) -> None:
    """Take one step, drawn by (seed, request, step) alone so that a resumed search takes the same step."""
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
    if not losses.isfinite().any():
        raise InputError(_no_loss(search, "not finite for any suffix of a step"))
    # Otherwise the smallest of the losses would be one that is not a number.
    matches = matches & ~losses.isnan()
    losses = losses.nan_to_num(nan=torch.inf, posinf=torch.inf)
    # A swap that reaches the target is preferred to one with a lower loss.
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
    """Return everything that a search depends on."""
    chosen = {name: value for name, value in asdict(options).items() if name not in ("batch_size", "save_every")}
    return {
        "prompt": search.prompt.text,
        "ids": [search.place.before, search.place.after],
        "target": search.target,
        "options": chosen,
        "weights": weights,
    }


def _weights_digest(model: CausalLM) -> str:
    """Compute a digest over a sample of each parameter, which identifies the model's weights."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        index = torch.linspace(0, flat.numel() - 1, min(64, flat.numel()), dtype=torch.float64).long()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(flat[index.to(flat.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()
