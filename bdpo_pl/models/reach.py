"""The parameters that text reaches. Those of a vision tower, and of layers that nothing reads, get no gradient.

Unreached parameters are frozen: they have no optimiser state and no adapters, and DistributedDataParallel does not wait
for their gradients. They remain in the model, so the exported model is whole.
"""

from __future__ import annotations

import re

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from bdpo_pl.models.architectures import text_model
from bdpo_pl.models.causal_lm import CausalLM

# Two tokens need not reach each expert, although a batch may reach it.
_EXPERT = re.compile(r"\bexperts\.\d+\.")


def freeze_unreached(model: CausalLM) -> set[str]:
    """Freeze the parameters of `model` that text never reaches; log their names, and return them."""
    names = unreached(model)
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(False)
    if names:
        number = sum(parameters[name].numel() for name in names)
        rank_zero_info(f"Frozen, since text never reaches them: {number:,} parameters of {', '.join(_parts(names))}")
    return names


def unreached(model: CausalLM) -> set[str]:
    """Return the names of the parameters of `model` on which its logits for text do not depend.

    They are read from the graph of a forward pass over two tokens, without a backward pass. If there is no such graph
    (quantised weights, layers that do not run on the meta device), they are the parameters outside the language model.
    """
    named = dict(model.named_parameters())
    trained = {name: p.requires_grad for name, p in named.items()}
    reached: set[int] = set()
    if all(p.is_floating_point() for p in named.values()):
        try:
            # A model that served as its own reference is still frozen.
            model.requires_grad_(True)
            reached = _reached(model)
        except Exception:  # the first real pass of the architecture will report the reason
            reached = set()
        finally:
            for name, p in named.items():
                p.requires_grad_(trained[name])
    if reached:
        return {name for name, p in named.items() if id(p) not in reached and not _EXPERT.search(name)}
    return _outside_language_model(model)


def _reached(model: CausalLM) -> set[int]:
    """Return the identities of the parameters in the graph of the logits."""
    text = model.config.get_text_config()
    special = {value for key, value in vars(model.config).items() if key.endswith(("token_id", "token_index"))}
    token = next(i for i in range(text.vocab_size) if i not in special)
    device = next(model.parameters()).device
    ids = torch.full((1, 2), token, device=device)
    with torch.enable_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    found: set[int] = set()
    seen: set[object] = set()
    waiting = [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [parent for parent, _ in node.next_functions]
    return found


def _outside_language_model(model: CausalLM) -> set[str]:
    language = text_model(model)
    if language is model:
        return set()
    inside = {id(p) for p in language.parameters()}
    if (head := model.get_output_embeddings()) is not None:
        inside |= {id(p) for p in head.parameters()}
    return {name for name, p in model.named_parameters() if id(p) not in inside}


def _parts(names: set[str]) -> list[str]:
    """Return the modules that contain the parameters of these names, abbreviated."""
    return sorted({".".join(part for part in name.split(".")[:2] if not part.isdigit()) for name in names})


def frozen_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters of `model` that are not trained."""
    return {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
