"""Models that no device holds whole, and rows that none does: FSDP2, tensor and context parallelism, whole ↔ split."""
