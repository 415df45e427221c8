"""Fixtures of the finetuning tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from glue_tiny import LETTERS, MRPC
from transformers import ElectraTokenizerFast


@pytest.fixture
def tokenizer(tmp_path: Path) -> ElectraTokenizerFast:
    """Tokenizer of single letters; its vocabulary is `tmp_path / "vocab.txt"`."""
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(LETTERS) + "\n")
    return ElectraTokenizerFast(vocab_file=str(vocabulary))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """TSV folder with two pairs of MRPC and one of STS-B."""
    for split in ("train", "dev"):
        (tmp_path / "MRPC").mkdir(exist_ok=True)
        (tmp_path / "MRPC" / f"{split}.tsv").write_text(MRPC)
    (tmp_path / "MRPC" / "test.tsv").write_text(MRPC.replace("Quality", "index"))
    (tmp_path / "STS-B").mkdir()
    (tmp_path / "STS-B" / "dev.tsv").write_text("sentence1\tsentence2\tscore\na\tb\t2.5\n")
    return tmp_path
