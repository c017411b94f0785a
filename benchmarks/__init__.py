"""Measurements of the kernels beside their peers. Results and their machine are in `results/`."""
