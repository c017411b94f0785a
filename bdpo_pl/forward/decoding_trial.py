"""A trial of whether a model can be decoded in continuous batches.

Nothing is assumed: short prompts are continued in such batches and one at a time by `transformers`, and both must give
the same logits up to rounding. The configuration says what a short trial cannot show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from bdpo_pl.errors import first_line, is_out_of_memory
from bdpo_pl.forward.decoding import Decoder, call_arguments
from bdpo_pl.forward.equivalence import compute_dtype, rounding_of_logits
from bdpo_pl.forward.masks import reach, rotates_alike, why_not_shared
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.precision import device_of

# Settings of generation that change nothing in greedy decoding, or that are given with each call. With any other,
# including those of releases to come, `generate` itself decodes.
_WITHOUT_EFFECT = frozenset({
    "_from_model_config", "bos_token_id", "cache_implementation", "continuous_batching_config", "do_sample",
    "early_stopping", "eos_token_id", "epsilon_cutoff", "eta_cutoff", "length_penalty", "max_length", "max_new_tokens",
    "min_p", "num_beams", "output_attentions", "output_hidden_states", "output_logits",
    "output_scores", "pad_token_id", "prompt_lookup_num_tokens", "repetition_penalty", "return_dict_in_generate",
    "temperature", "top_h", "top_k", "top_p", "transformers_version", "typical_p", "use_cache",
})  # fmt: skip
_NEUTRAL: tuple[object, ...] = (None, False, 0, 1.0, [], {})
_TRIAL_TOKENS, _TRIAL_LENGTHS = 3, (24, 17, 9)

_found: WeakKeyDictionary[nn.Module, dict[Any, str | None]] = WeakKeyDictionary()


def why_not_continuous(model: CausalLM, prompts: Sequence[list[int]], max_new_tokens: int, pad_id: int) -> str | None:
    """Return why `model` cannot be decoded in continuous batches; None if it can.

    The trial is held once for each model and attention implementation. Call it as `Decoder`.

    Args:
        model: the model.
        prompts: at least one prompt; three, shortened, are used in the trial.
        max_new_tokens: maximum number of generated tokens.
        pad_id: token id of the padding.
    """
    if not all(prompts):
        return "a prompt has no tokens"
    if known := _known(model, max(map(len, prompts)) + max_new_tokens):
        return known
    key = (model.config._attn_implementation, compute_dtype(model), device_of(model))
    tried = _found.setdefault(model, {})
    if key not in tried:
        tried[key] = _objection(model, prompts, pad_id)
    return tried[key]


def _known(model: CausalLM, length: int) -> str | None:
    """Return the reason that the configuration tells, for sequences of `length` tokens."""
    name = type(model).__name__
    if not isinstance(model, GenerationMixin) or type(model).generate is not GenerationMixin.generate:
        return f"{name} generates in a way of its own"
    if not type(model).__module__.startswith("transformers."):
        return f"{name} is not one of transformers' models, and may compute something else in long rows"
    if shared := why_not_shared(model):
        return shared
    config = model.config.get_text_config()
    if not rotates_alike(config):
        return "its rotary embedding changes with the length of the row"
    if (far := reach(config)) is not None and far < length:
        return f"its attention reaches back {far} tokens, and a prompt with its answer has up to {length}"
    if not call_arguments(model).cache:
        return f"{name} takes no cache"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "its layers are on several devices"
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        return "its weights are split over processes"
    settings = model.generation_config.to_diff_dict()
    other = sorted(k for k, v in settings.items() if k not in _WITHOUT_EFFECT and v not in _NEUTRAL)
    return f"its generation settings have {', '.join(other)}" if other else None


def _objection(model: CausalLM, prompts: Sequence[list[int]], pad_id: int) -> str | None:
    """Continue three short prompts in two slots and alone, and return in what they differ."""
    tried = [prompts[i % len(prompts)][:length] for i, length in enumerate(_TRIAL_LENGTHS)]
    logits: dict[int, list[Tensor]] = {}
    try:
        decoder = Decoder(
            model, (), max_new_tokens=_TRIAL_TOKENS, num_slots=2, hands_back=False,
            watch=lambda number, row: logits.setdefault(number, []).append(row),
        )  # fmt: skip
        for _ in decoder.decode(tried):
            pass
        for number, prompt in enumerate(tried):
            ids = torch.tensor([prompt], device=device_of(model))
            alone = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=_TRIAL_TOKENS, do_sample=False,
                num_beams=1, use_cache=True, eos_token_id=None, pad_token_id=pad_id, temperature=None, top_p=None,
                top_k=None, prompt_lookup_num_tokens=None, output_scores=True, return_dict_in_generate=True,
            )  # fmt: skip
            # The model may end a continuation sooner.
            for row, (scores,) in zip(logits[number], alone.scores, strict=False):  # type: ignore[attr-defined]
                expected = scores.float()
                error = (row - expected).abs().max()
                if not error <= rounding_of_logits(expected.abs().max(), compute_dtype(model)):
                    return f"logits differ by {error:.2g} from those of a prompt alone, more than rounding explains"
                if row.argmax() != expected.argmax():
                    break
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"{type(model).__name__} fails in such batches ({type(error).__name__}: {first_line(error)})"
    return None
