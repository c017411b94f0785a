"""Models that no device holds whole: FSDP2, tensor parallelism, and conversions between split and whole tensors."""
