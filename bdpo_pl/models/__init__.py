"""Models of transformers: loading, adapters, and what is known of an architecture."""
