"""Names under which version 0.1 had the module and its optimiser, so that its YAML files still parse.

`--print_config` wrote `optimizer: bdpo_pl.module.adamw`. Import from `bdpo_pl` or `bdpo_pl.training.optim` instead.
"""

from bdpo_pl.training.module import PreferenceModule
from bdpo_pl.training.optim import adamw

__all__ = ["PreferenceModule", "adamw"]
