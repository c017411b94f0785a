"""What a model makes of a preference set before it is trained on it."""
