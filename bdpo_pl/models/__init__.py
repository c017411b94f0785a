"""Models of transformers: loading, adapters, and facts about architectures."""
