"""The losses that Balanced DPO is compared with."""

from bdpo_pl.losses import CPOLoss, IPOLoss, RMiPOLoss, SafeDPOLoss, SimPOLoss

LOSSES = [IPOLoss, CPOLoss, SimPOLoss, SafeDPOLoss, RMiPOLoss]
REFERENCE_FREE = [CPOLoss, SimPOLoss]
