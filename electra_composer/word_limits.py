"""Length of the longest word that WordPiece splits into pieces; a longer one becomes `[UNK]`."""

from __future__ import annotations

import json
import os

from tokenizers import models
from transformers import PreTrainedTokenizerFast

WORD_LIMIT = 200
"""Characters, in the code of BERT and of google-research/electra (`model/tokenization.py`)."""

LIBRARY_WORD_LIMIT = 100
"""Default of `tokenizers`, which is also in the files of BERT and ELECTRA on the hub."""


def use_word_limit(tokenizer: PreTrainedTokenizerFast) -> None:
    """Let WordPiece split words of up to :data:`WORD_LIMIT` characters, unless it has a limit of its own."""
    model = tokenizer.backend_tokenizer.model
    if isinstance(model, models.WordPiece) and model.max_input_chars_per_word == LIBRARY_WORD_LIMIT:
        model.max_input_chars_per_word = WORD_LIMIT


def word_limit(folder: str) -> int | None:
    """Return the limit in characters of the tokenizer saved in a folder; None if it has none, or cannot be read."""
    try:
        with open(os.path.join(folder, "tokenizer.json"), encoding="utf-8") as file:
            model = json.load(file)["model"]
        return int(model["max_input_chars_per_word"]) if model["type"] == "WordPiece" else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
