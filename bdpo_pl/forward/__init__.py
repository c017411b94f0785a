"""From a batch to log-probabilities: masks, prompt sharing, the fused head, and the trials that admit them."""
