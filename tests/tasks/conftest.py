"""Fixtures of the tests of tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
from glue_tiny import LETTERS
from transformers import ElectraTokenizerFast


@pytest.fixture
def letters(tmp_path: Path) -> ElectraTokenizerFast:
    """Tokenizer of single letters."""
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(LETTERS) + "\n")
    return ElectraTokenizerFast(vocab_file=str(vocabulary))
