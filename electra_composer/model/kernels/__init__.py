"""Masked-LM loss with sampling, attention within examples, and dropout for CPUs."""
