"""Logged values that stay where they are, as on a machine without GPUs they do in any case."""

import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric


def stay():
    """Let Lightning take values to be on the CPU if there is no GPU.

    To move a value, it looks through all attributes of each, with copies of some: an eighth of a short run.
    """
    if torch.cuda.is_available() or _ResultMetric.to is not _move:
        return

    def to(metric, *args, **kwargs):
        return metric if metric.is_tensor else _move(metric, *args, **kwargs)

    _ResultMetric.to = to


_move = _ResultMetric.to
