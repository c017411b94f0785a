"""Preference losses: pure functions of per-sequence log-probabilities.

A loss is a small callable, selected in YAML by its `class_path`; the training module refers to none by name. To write
your own, subclass `PreferenceLoss`.
"""

from bdpo_pl.losses.ada_dpo import AdaDPOLoss
from bdpo_pl.losses.apo import APODownLoss, APOZeroLoss
from bdpo_pl.losses.balanced_dpo import BalancedDPOLoss, DPOLoss
from bdpo_pl.losses.base import PairScores, PairWeights, PreferenceLoss
from bdpo_pl.losses.bso import BSOLoss
from bdpo_pl.losses.combined import BalancedLoss, SFTLoss, WeightedSum, WPOLoss
from bdpo_pl.losses.cpo import CPOLoss
from bdpo_pl.losses.dr_dpo import DrDPOLoss
from bdpo_pl.losses.hinge import HingeLoss
from bdpo_pl.losses.ipo import IPOLoss
from bdpo_pl.losses.kto import KTOLoss
from bdpo_pl.losses.length_desensitized import LDLoss
from bdpo_pl.losses.rmipo import RMiPOLoss
from bdpo_pl.losses.robust_dpo import RobustDPOLoss
from bdpo_pl.losses.safe_dpo import SafeDPOLoss
from bdpo_pl.losses.sigmoid_norm import SigmoidNormLoss
from bdpo_pl.losses.simpo import SimPOLoss

__all__ = [
    "APODownLoss",
    "APOZeroLoss",
    "AdaDPOLoss",
    "BSOLoss",
    "BalancedDPOLoss",
    "BalancedLoss",
    "CPOLoss",
    "DPOLoss",
    "DrDPOLoss",
    "HingeLoss",
    "IPOLoss",
    "KTOLoss",
    "LDLoss",
    "PairScores",
    "PairWeights",
    "PreferenceLoss",
    "RMiPOLoss",
    "RobustDPOLoss",
    "SFTLoss",
    "SafeDPOLoss",
    "SigmoidNormLoss",
    "SimPOLoss",
    "WPOLoss",
    "WeightedSum",
]
