"""Sources to convert."""

from __future__ import annotations

import random

import pytest
from converter import WORDS, jsonl, text, write_vocabulary


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with 300 documents of a few lines, and a vocabulary in which every word is one token."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    documents = ["\n".join(text(rng, rng.randint(1, 3)) for _ in range(rng.randint(1, 12))) for _ in range(300)]
    (folder / "corpus.jsonl").write_bytes(jsonl(documents))
    write_vocabulary(folder, "[", "]", "mask", "sep", *WORDS)
    return folder


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary"), *WORDS)
