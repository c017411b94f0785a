"""Preference losses: pure functions of per-sequence log-probabilities.

A loss is a small callable, picked in YAML by its `class_path`; the training module knows none by name. Write your own
by subclassing `PreferenceLoss`.
"""

from bdpo_pl.losses.balanced_dpo import BalancedDPOLoss, DPOLoss
from bdpo_pl.losses.base import PairScores, PairWeights, PreferenceLoss
from bdpo_pl.losses.cpo import CPOLoss
from bdpo_pl.losses.ipo import IPOLoss
from bdpo_pl.losses.rmipo import RMiPOLoss
from bdpo_pl.losses.safe_dpo import SafeDPOLoss
from bdpo_pl.losses.simpo import SimPOLoss

__all__ = [
    "BalancedDPOLoss",
    "CPOLoss",
    "DPOLoss",
    "IPOLoss",
    "PairScores",
    "PairWeights",
    "PreferenceLoss",
    "RMiPOLoss",
    "SafeDPOLoss",
    "SimPOLoss",
]
