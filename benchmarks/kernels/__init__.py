"""Fused kernels beside their peers."""
