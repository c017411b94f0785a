"""Checks of the arguments before any kernel runs. Errors name the argument and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is a tensor of a supported floating dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}; cast it")


def check_integer(name: str, tensor: Tensor, device: torch.device | None = None) -> None:
    """Raise TypeError unless `tensor` is an int64 or int32 tensor, ValueError unless it is on `device`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be int64 or int32, got {tensor.dtype}; use {name}.long()")
    if device is not None and tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device}, but it must be on {device} with the others; use {name}.to({str(device)!r})"
        )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], why: str) -> None:
    """Raise ValueError unless `tensor` has `shape`; `why` is the explanation in the message."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)} ({why}), got {tuple(tensor.shape)}")


def check_sequences(
    rows: tuple[int, ...], sequence_ids: Tensor | None, num_sequences: int | None, device: torch.device | None
) -> int:
    """Return the number of sequences S of packed (N,) or padded (B, T) rows.

    Raises:
        TypeError, ValueError: `sequence_ids` is missing, superfluous or has the wrong shape, dtype or device.
    """
    if len(rows) == 2:
        if sequence_ids is not None:
            raise ValueError(
                "sequence_ids belongs to packed input; padded (B, T) rows are their own sequences, omit it"
            )
        if num_sequences not in (None, rows[0]):
            raise ValueError(f"num_sequences is {num_sequences}, but padded input has B = {rows[0]} sequences; omit it")
        return rows[0]
    if sequence_ids is None:
        raise ValueError("packed input needs sequence_ids (N,), the index of each token's sequence")
    check_integer("sequence_ids", sequence_ids, device)
    check_shape("sequence_ids", sequence_ids, rows, "one for each packed token")
    if num_sequences is None:
        return int(sequence_ids.max()) + 1 if sequence_ids.numel() else 0
    if not _is_integer(num_sequences):
        raise TypeError(f"num_sequences must be an int, got {type(num_sequences).__name__}")
    if num_sequences < 0:
        raise ValueError(f"num_sequences must be ≥ 0, got {num_sequences}")
    return num_sequences


def _is_integer(value: object) -> bool:
    # A dynamic size is a symbol while torch.export or torch.compile traces.
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> torch.dtype:
    """Return the dtype of hidden @ weightᵀ + bias: autocast's if it is enabled, else the tensors' own.

    Raises:
        TypeError, ValueError: a tensor has the wrong dtype, shape or device.
    """
    tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in tensors.items():
        check_floating(name, tensor)
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, but hidden is on {hidden.device}; move one of them")
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be packed (N, D), got shape {tuple(hidden.shape)}; flatten padded positions")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must have shape (V, {hidden.shape[1]}) as hidden has D, got {tuple(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError("weight has an empty vocabulary: its first dimension must be ≥ 1")
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],), "one for each row of weight")
    check_integer("labels", labels, hidden.device)
    check_shape("labels", labels, (hidden.shape[0],), "one for each row of hidden")
    if _autocasts(hidden.device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    for name, tensor in tensors.items():
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and hidden {hidden.dtype}; cast one, or use autocast")
    return hidden.dtype


def _autocasts(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Disable autocast, so that products keep their operands' dtypes. A meta device has no autocast to disable."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device) else nullcontext()


def check_label_values(labels: Tensor, V: int, ignore_index: int) -> None:
    """Raise ValueError unless every label is `ignore_index` or in [0, V). This synchronises with the device."""
    wrong = ((labels < 0) | (labels >= V)) & (labels != ignore_index)
    if bool(wrong.any()):
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"labels[{', '.join(map(str, where))}] is {int(labels[where])}, outside the vocabulary [0, {V}) and not "
            f"ignore_index ({ignore_index}); check that the tokenizer belongs to the model"
        )


def check_sequence_values(sequence_ids: Tensor, num_sequences: int) -> None:
    """Raise ValueError unless every index is in [0, S). This synchronises with the device."""
    wrong = (sequence_ids < 0) | (sequence_ids >= num_sequences)
    if bool(wrong.any()):
        where = int(wrong.nonzero()[0])
        raise ValueError(
            f"sequence_ids[{where}] is {int(sequence_ids[where])}, outside [0, {num_sequences}); raise num_sequences "
            "or correct the index"
        )


def check_lengths(lengths: Sequence[int], S: int, labels: Tensor) -> None:
    """Raise ValueError unless `lengths` has S numbers of tokens whose sum does not exceed the number of labels."""
    if len(lengths) != S or any(not _is_integer(length) or length < 0 for length in lengths):
        raise ValueError(f"lengths must be {S} ints ≥ 0, one for each sequence; got {list(lengths)[:8]}")
    if sum(lengths) > len(labels):
        raise ValueError(f"lengths add up to {sum(lengths)} tokens, but there are only {len(labels)}")


def check_length_values(lengths: Sequence[int], labels: Tensor, sequence_ids: Tensor, ignore_index: int) -> None:
    """Raise ValueError unless each sequence has exactly `lengths` labels that count.

    This synchronises with the device.
    """
    counted = torch.bincount(sequence_ids.long()[labels != ignore_index], minlength=len(lengths)).tolist()
    if counted != list(lengths):
        wrong = next(i for i, pair in enumerate(zip(counted, lengths, strict=True)) if pair[0] != pair[1])
        raise ValueError(
            f"lengths[{wrong}] is {lengths[wrong]}, but {counted[wrong]} tokens of sequence {wrong} have a label other "
            f"than ignore_index ({ignore_index}); count those, or omit lengths"
        )
