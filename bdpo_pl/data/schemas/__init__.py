"""Schemas of preference data. A new one is a file in this folder and a line in `SCHEMAS`."""

from __future__ import annotations

from bdpo_pl.data.schemas.hh_rlhf import HH_RLHF
from bdpo_pl.data.schemas.preference import PREFERENCE
from bdpo_pl.data.schemas.published import AZURE, KTO_, ORCA, SHARE_GPT
from bdpo_pl.data.schemas.safe_rlhf import SAFE_RLHF
from bdpo_pl.data.schemas.schema import Schema
from bdpo_pl.data.schemas.single import SINGLE

SCHEMAS: tuple[Schema, ...] = (SAFE_RLHF, AZURE, KTO_, SINGLE, SHARE_GPT, HH_RLHF, ORCA, PREFERENCE)
"""Schemas in the order in which they are tried: a file of an earlier one may have the columns of a later one too."""
