"""Balanced DPO (arXiv:2603.22829) for open language models, on PyTorch Lightning."""
