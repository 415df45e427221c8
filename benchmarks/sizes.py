"""Sizes of the models that the benchmarks train: those of the YAMLs, and a tiny one, which tests the programs."""

SIZES = ("tiny", "small", "base", "large")
TINY = (
    "data.max_seq_length=32",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.embedding_size=16",
    "model.generator_size=0.5",
    "model.max_positions=64",
)
"""Overrides of `small.yaml`."""
