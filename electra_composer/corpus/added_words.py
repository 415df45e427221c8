"""Extend a WordPiece vocabulary by the words of a domain."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from tempfile import TemporaryDirectory

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from electra_composer.errors import UserError

FEWEST = 2  # occurrences of a word to be added


def add_words(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], count: int) -> PreTrainedTokenizerFast:
    """Append the most frequent words that a vocabulary splits into pieces.

    The old entries keep their ids, so that a model of the old vocabulary can be continued (`model.init_from`). The same
    texts in any order give the same vocabulary.

    Args:
        tokenizer: WordPiece.
        texts: of the domain.
        count: number of words to add; fewer if the texts have not as many that occur at least :data:`FEWEST` times.

    Raises:
        UserError: a tokenizer of another kind, or no word to add.
    """
    backend = tokenizer.backend_tokenizer
    if json.loads(backend.to_str())["model"]["type"] != "WordPiece" or backend.pre_tokenizer is None:
        raise UserError(
            f"--add-vocabulary: the tokenizer {tokenizer.name_or_path} is no WordPiece vocabulary; expected one such "
            "as those of BERT and ELECTRA"
        )
    occurrences: Counter[str] = Counter()
    for text in texts:
        normal = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
        occurrences.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal))
    known = tokenizer.get_vocab()
    missing = [
        word
        for word, number in occurrences.items()
        if number >= FEWEST and word not in known and _is_split(word, tokenizer)
    ]
    chosen = sorted(missing, key=lambda word: (-occurrences[word], word))[:count]
    if not chosen:
        raise UserError(
            f"--add-vocabulary {count}: the vocabulary has all words of the text as entries, or they occur once; "
            "leave it out"
        )
    return _with_words(tokenizer, chosen)


def _is_split(word: str, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether a word is known by its pieces. One of unknown characters would be the mean of nothing."""
    pieces = tokenizer.tokenize(word)
    return len(pieces) > 1 and tokenizer.unk_token not in pieces


def _with_words(tokenizer: PreTrainedTokenizerFast, words: list[str]) -> PreTrainedTokenizerFast:
    first = len(tokenizer)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = os.path.join(folder, "tokenizer.json")
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        content["model"]["vocab"] |= {word: first + number for number, word in enumerate(words)}
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False)
        plain = os.path.join(folder, "vocab.txt")
        if os.path.isfile(plain):
            with open(plain, "a", encoding="utf-8") as file:
                file.writelines(f"{word}\n" for word in words)
        extended = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    extended.name_or_path = f"{tokenizer.name_or_path}+{len(words)}"
    return extended
