"""Fused operations. Each has a plain PyTorch implementation with the same signature."""
