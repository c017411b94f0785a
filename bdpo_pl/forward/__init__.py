"""From a batch to log-probabilities: masks, prefix sharing, the fused head, and the trials that validate them."""
