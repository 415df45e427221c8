"""Fixtures of the tests of tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from glue_tiny import LETTERS
from tagging_inputs import ENTRIES
from transformers import ElectraConfig, ElectraModel, ElectraTokenizerFast


@pytest.fixture
def letters(tmp_path: Path) -> ElectraTokenizerFast:
    """Tokenizer of single letters."""
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(LETTERS) + "\n")
    return ElectraTokenizerFast(vocab_file=str(vocabulary))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ElectraTokenizerFast:
    vocabulary = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    vocabulary.write_text("\n".join(ENTRIES) + "\n")
    return ElectraTokenizerFast(vocab_file=str(vocabulary))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: ElectraTokenizerFast) -> Path:
    """A tiny discriminator."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    config = ElectraConfig(
        vocab_size=len(ENTRIES),
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,
        num_labels=5,
    )
    ElectraModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
