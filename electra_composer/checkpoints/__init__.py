"""Saving, resuming, remote copies, safe loading, and weights to and from transformers."""
