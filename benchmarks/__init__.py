"""Measurements: kernels beside their peers. Results with their machine lie in `results/`."""
