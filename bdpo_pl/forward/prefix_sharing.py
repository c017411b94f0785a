"""Prefix sharing: a trial, before training, of whether a model can read a pair as one row.

Nothing is assumed: the model scores a few real pairs with the responses in rows of their own and in shared rows, and
must give the same log-probabilities and the same gradients. Its log-probability of one response must not change when
another response changes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from bdpo_pl.data.batches import pair_documents
from bdpo_pl.data.packing import Document, RowLayout, SequenceBatch, lay_out, renumbered
from bdpo_pl.data.table import PairTable
from bdpo_pl.errors import InputError, MachineError, first_line, is_out_of_memory
from bdpo_pl.forward.agreement import largest, recovers, with_less_memory
from bdpo_pl.forward.document_attention import DOCUMENTS
from bdpo_pl.forward.equivalence import (
    compute_dtype,
    evaluating,
    gradient_error,
    rounding_of_gradients,
    rounding_of_logps,
)
from bdpo_pl.forward.masks import TRAINING_ONLY, depends_on_length, set_attention, why_not_shared
from bdpo_pl.forward.reading import Reading, read, values, weighted
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.forward.soundness import check_sound
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.precision import device_of
from bdpo_pl.parallel.context_parallel import shares_attention

PrefixSharing = Literal["auto", "always", "never"]

# A correct mask contributes exact zeros, so a change of one response must not change another at all. Only in a mixture
# may rounding differ, because its experts then get other tokens, so the bound is a share of the rounding tolerance.
_LEAK_SHARE = 0.125
# Tokens of a pair beyond which a longer one shows nothing new, if nothing in the model depends on length.
_ENOUGH_TOKENS = 256
# Maximum number of pairs in a timed batch, and number of runs after the first one, which compiles.
_TIMED_PAIRS, _TIMED_RUNS = 16, 3
# Dense masks must be faster by this factor, so that the choice does not change from run to run.
_CLEARLY = 0.85
# Operations of a document in one layer, on a CPU, beyond which less padding saves more than a call of attention costs.
_PAYS = 2e8


def choose_layout(
    model: CausalLM,
    table: PairTable,
    option: PrefixSharing = "auto",
    *,
    name: str = "the model",
    attention: str | None = None,
    pad_id: int = 0,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> RowLayout:
    """Choose the most efficient layout in which `model` gives exact log-probabilities.

    A notice is logged if a more efficient layout fails. On a GPU, if the user has not named an implementation,
    block-sparse attention is tried first, with a backward pass. It is kept if its results agree and dense masks are not
    clearly faster. On a CPU, attention of one document at a time is tried first, if documents and layers are large
    enough. Ranks that hold parts of `model` choose together.

    Args:
        model: causal language model, on the device that it will run on.
        table: pairs for the trial, of which two are compared (`probe_documents`), and on a GPU up to 16 are timed.
        option: `never` keeps a row for each response; `always` raises an error if the model cannot share rows.
        name: name of the model, for messages.
        attention: attention implementation that the user named, if any.
        pad_id: token id of the padding.
        context: context manager that is entered around each forward pass, for autocast.

    Raises:
        InputError: the option is `always`, and the model cannot share rows; or log-probabilities cannot be computed
            with it (`check_sound`).
        MachineError: there is no memory for the trial.
    """
    if attention is None and model.config._attn_implementation in TRAINING_ONLY:
        set_attention(model, "sdpa")  # an earlier choice, for other pairs
    documents = probe_documents(table, model)
    if option == "always" and (known := why_not_shared(model)):
        raise _cannot_share(name, known)
    check_sound(model, documents[-1], name, pad_id, context)
    if option == "never":
        return RowLayout.SPLIT
    on_gpu = _on_gpu(model)

    def objection_to(layout: RowLayout, reference: str | None = None) -> str | None:
        return _agreed(model, _objection(model, documents, layout, pad_id, context, reference))

    if on_gpu and attention is None and getattr(model, "_supports_flex_attn", False):
        before = model.config._attn_implementation
        set_attention(model, "flex_attention")
        objection = objection_to(RowLayout.ONE_ROW, reference=before)
        sparse, pairs = (None, 0) if objection else _seconds(model, table, RowLayout.ONE_ROW, pad_id, context)
        set_attention(model, before)
        if sparse is not None and objection_to(RowLayout.SHARED) is None:
            dense, same = _seconds(model, table, RowLayout.SHARED, pad_id, context, pairs)
            # Dense masks that have no memory for as many pairs are not faster.
            if dense is not None and same == pairs and dense < _CLEARLY * sparse:
                objection = (
                    f"dense masks are faster on these pairs ({dense * 1e3:.0f} ms against {sparse * 1e3:.0f} ms for "
                    "the same rows); set model.attn_implementation to fix the choice"
                )
        if objection is None:
            set_attention(model, "flex_attention")
            return RowLayout.ONE_ROW
        rank_zero_info(f"Block-sparse attention is not used: {objection}")
    padded = None
    if attention is None and _unpadded_pays(model, table):
        before = model.config._attn_implementation
        set_attention(model, DOCUMENTS)
        padded = objection_to(RowLayout.UNPADDED, reference=before)
        if padded is None:
            return RowLayout.UNPADDED
        set_attention(model, before)
    layout = RowLayout.ONE_ROW if attention == "flex_attention" and on_gpu else RowLayout.SHARED
    objection = objection_to(layout)
    if objection is None:
        if padded is not None:
            rank_zero_info(f"Documents are not read one at a time, rows are padded: {padded}")
        return layout
    if option == "always":
        raise _cannot_share(name, objection)
    rank_zero_info(f"Prompts are not shared, each response has a row of its own: {objection}")
    return RowLayout.SPLIT


def probe_documents(table: PairTable, model: CausalLM) -> list[Document]:
    """Return a long and a short pair on which to try `model`.

    The long one is the longest of all if the model computes something else at a distance, as with windows. Otherwise a
    pair of moderate length shows the same at a fraction of the time.
    """
    sizes = table.num_tokens(shared=True)
    long = sizes if depends_on_length(model) else np.where(sizes <= _ENOUGH_TOKENS, sizes, -sizes)
    return pair_documents([table[i] for i in dict.fromkeys((int(long.argmax()), int(sizes.argmin())))])


def _unpadded_pays(model: CausalLM, table: PairTable) -> bool:
    """Return true if attention of one document at a time can be tried, and documents are large enough for it to pay."""
    if device_of(model).type != "cpu" or model.config._attn_implementation != "sdpa":
        return False
    if shares_attention() or why_not_shared(model):
        return False
    # The products of a layer whose MLP is four times as wide as its hidden states.
    D = getattr(model.config.get_text_config(), "hidden_size", 0)
    return float(table.num_tokens(shared=True).mean()) * 24 * D**2 >= _PAYS


def _cannot_share(name: str, objection: str) -> InputError:
    return InputError(f"model.prefix_sharing is always, but {name} cannot share a prompt: {objection}; set it to auto")


def _on_gpu(model: CausalLM) -> bool:
    return device_of(model).type == "cuda"


def _agreed(model: CausalLM, objection: str | None) -> str | None:
    """Return `objection`; ranks that hold parts of `model` all object if one of them does."""
    if largest(model, float(objection is not None)) and objection is None:
        return "another process objects to it"
    return objection


def _objection(
    model: CausalLM,
    documents: Sequence[Document],
    layout: RowLayout,
    pad_id: int,
    context: Callable[[], AbstractContextManager[object]],
    reference: str | None = None,
    backward: bool = True,
) -> str | None:
    """Return why `layout` is not valid for `model`, or None.

    Without memory for a backward pass over all pairs, gradients are compared on the shortest alone: scoring has no such
    pass, and training may have room for it, with gradient checkpointing, which is off here, or with the fused head.

    Args:
        model: model, on the device that it will run on.
        documents: pairs for the trial, the shortest last.
        layout: layout to be tried.
        pad_id: token id of the padding.
        context: context manager that is entered around each forward pass.
        reference: attention implementation to compare with, if it is another one.
        backward: compare gradients too.

    Raises:
        MachineError: there is no memory for the trial.
    """
    if known := why_not_shared(model):
        return known

    def less() -> str | None:
        shortest = renumbered(documents[-1:])
        return _objection(model, documents, layout, pad_id, context, reference, backward=False) or _objection(
            model, shortest, layout, pad_id, context, reference
        )

    try:
        return with_less_memory(
            model,
            lambda: _difference(model, documents, layout, pad_id, context, reference, backward),
            less if backward and len(documents) > 1 else None,
            f"shared rows, with a pair of {max(document.num_tokens for document in documents)} tokens",
            "Lower data.max_length (evaluate: pairs.max_length), or leave out the trial: set model.prefix_sharing to "
            "never",
        )
    except MachineError:
        raise
    except Exception as error:
        recovers(model)
        return f"{type(model).__name__} fails on such rows ({type(error).__name__}: {first_line(error)})"


def _difference(
    model: CausalLM,
    documents: Sequence[Document],
    layout: RowLayout,
    pad_id: int,
    context: Callable[[], AbstractContextManager[object]],
    reference: str | None,
    backward: bool,
) -> str | None:
    """Return in what `layout` differs from rows of their own, or None; the arguments are those of `_objection`."""
    with evaluating(model), context():
        dtype = compute_dtype(model)
        shared = _reading(model, documents, layout, pad_id, backward=backward)
        with torch.no_grad():
            before, after = (
                response_logps(model, _batch(model, some, layout, pad_id), whole=True)
                for some in (documents, _with_another_response(documents, model))
            )
        with _attention(model, reference):
            alone = _reading(model, documents, RowLayout.SPLIT, pad_id, whole=True, backward=backward)
    lengths = torch.tensor([len(ids) for document in documents for _, ids in document.responses])
    bounds = rounding_of_logps(alone.logps, lengths.to(alone.logps.device), dtype)
    # Only the first sequence was changed.
    leak = (after - before).abs()[1:]
    if not (leak <= _LEAK_SHARE * bounds[1:]).all():
        return f"a response is seen by another (log-probabilities change by {leak.max():.2g} nats)"
    difference = (shared.logps - alone.logps).abs()
    if not (difference <= bounds).all():
        return (
            f"log-probabilities differ from those of responses alone by {difference.max():.2g} nats, more than "
            f"rounding explains ({bounds[int(difference.argmax())]:.2g})"
        )
    share = gradient_error(shared.parts, alone.parts) if backward else 0.0
    if not share <= rounding_of_gradients(dtype):
        return f"gradients differ from those of responses alone by {share:.2g} of their size"
    return None


def _reading(
    model: CausalLM,
    documents: Sequence[Document],
    layout: RowLayout,
    pad_id: int,
    *,
    whole: bool = False,
    backward: bool = True,
) -> Reading:
    batch = _batch(model, documents, layout, pad_id)

    def run() -> tuple[Tensor, Tensor]:
        logps = response_logps(model, batch, whole=whole)
        return logps, weighted(logps)

    return read(model, batch, documents, run) if backward else values(run)


def _batch(model: CausalLM, documents: Sequence[Document], layout: RowLayout, pad_id: int) -> SequenceBatch:
    return lay_out(documents, layout, pad_id).to(device_of(model))


@contextmanager
def _attention(model: CausalLM, implementation: str | None) -> Iterator[None]:
    """Switch `model` to the attention `implementation` while the context is open, if one is given."""
    used = model.config._attn_implementation
    set_attention(model, implementation or used)
    try:
        yield
    finally:
        set_attention(model, used)


def _seconds(
    model: CausalLM,
    table: PairTable,
    layout: RowLayout,
    pad_id: int,
    context: Callable[[], AbstractContextManager[object]],
    most: int = _TIMED_PAIRS,
) -> tuple[float | None, int]:
    """Return the seconds of a forward and a backward pass over pairs from all of `table`, and the number of pairs.

    There are at most `most` pairs; if they do not fit into memory, half as many, and so on. The time is None if a
    single pair does not fit. The first pass is not counted. If ranks hold parts of `model`, the slowest one counts.
    """
    pairs = min(len(table), most)
    while pairs:
        chosen = np.linspace(0, len(table) - 1, pairs).astype(int)
        documents = pair_documents([table[int(i)] for i in chosen])
        times: list[float] = []
        while len(times) <= _TIMED_RUNS and math.inf not in times:
            times.append(largest(model, _seconds_of_a_pass(model, documents, layout, pad_id, context)))
        if math.inf not in times:
            return min(times[1:]), pairs
        pairs //= 2
        if _on_gpu(model):
            torch.cuda.empty_cache()
    return None, 0


def _seconds_of_a_pass(
    model: CausalLM,
    documents: Sequence[Document],
    layout: RowLayout,
    pad_id: int,
    context: Callable[[], AbstractContextManager[object]],
) -> float:
    """Return the seconds of a forward and a backward pass; infinity if there is no memory for it.

    The mode is that of evaluation, in which gradient checkpointing is off, so training may have room for more.
    """
    try:
        with evaluating(model), context():
            _wait(model)
            start = time.perf_counter()
            _reading(model, documents, layout, pad_id)
            _wait(model)
            return time.perf_counter() - start
    except Exception as error:
        if not is_out_of_memory(error) or not recovers(model):
            raise
        return math.inf


def _wait(model: CausalLM) -> None:
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _with_another_response(documents: Sequence[Document], model: CausalLM) -> list[Document]:
    """Return `documents` with every token of sequence 0 replaced by another."""
    V = model.config.get_text_config().vocab_size
    first, *rest = documents
    (number, ids), *others = first.responses
    assert number == 0
    return [first._replace(responses=[(0, [(token + 1) % V for token in ids]), *others]), *rest]
