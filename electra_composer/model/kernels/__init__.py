"""What is fused by hand: each kernel has a plain PyTorch twin of the same signature."""
