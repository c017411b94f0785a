"""Models to talk to: in this process, or behind an endpoint."""
