"""Align a model from Python, without the command line: `python examples/fit_in_python.py`.

It aligns the small embedded model on the embedded pairs for a few steps. Name your own model and file in their place.
"""

import lightning as L
import torch

from bdpo_pl import PreferenceDataModule, PreferenceModule
from bdpo_pl.losses import BalancedDPOLoss


def optimizer(parameters):
    """AdamW at a rate for two million parameters; a model of billions takes 1e-6 or less."""
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)


def main(max_steps: int = 20) -> dict[str, float]:
    """Train, and return what was measured of the held-out pairs at the end."""
    L.seed_everything(0)
    module = PreferenceModule("embedded", loss=BalancedDPOLoss(beta=0.1), optimizer=optimizer)
    data = PreferenceDataModule("embedded", batch_size=16)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,  # the data module splits batches between ranks itself
    )
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    result = module.evaluations[module.global_step]
    print({name: round(value, 3) for name, value in result.items() if name.startswith("held_out/")})
    # A plain model of transformers, with every method of one.
    module.policy.eval()
    return result


if __name__ == "__main__":
    main()
