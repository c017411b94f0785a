"""Adapters as other programs leave them, for the tests."""

import torch

from bdpo_pl.models.loading import ModelSource, load_model


def sft_adapter(model_dir, folder, **changes):
    """An adapter that peft saved, as supervised fine-tuning leaves one."""
    from peft import LoraConfig, get_peft_model

    config = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1, **changes}
    model = get_peft_model(load_model(ModelSource(str(model_dir)), torch.float32), LoraConfig(**config))
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=g) * (0.02 if "modules_to_save" in name else 0.1)
    model.save_pretrained(folder)
    return model
