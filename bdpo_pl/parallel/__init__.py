"""Models that no device holds whole: FSDP2, tensor parallelism, and their way to whole tensors and back."""
