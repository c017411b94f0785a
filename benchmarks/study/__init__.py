"""A laboratory for the claims of Balanced DPO (arXiv:2603.22829): a small world of chat in which they can be false.

`python -m benchmarks.study` trains a reference from scratch and aligns it by every method: one JSON record per run.
"""
