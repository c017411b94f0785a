"""The Lightning side: module, data module, callbacks, checkpoints, and what a run writes."""
