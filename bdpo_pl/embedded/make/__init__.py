"""The scripts that made the embedded model and pairs."""
