"""Words of a domain are appended to a WordPiece vocabulary: the most frequent that it splits, old ids as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
from converter import assert_same_files, jsonl, rows_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from electra_composer.corpus.added_words import add_words
from electra_composer.corpus.conversion import convert
from electra_composer.corpus.dry_run import dry_run
from electra_composer.corpus.options import Conversion
from electra_composer.corpus.sources import Sources
from electra_composer.errors import UserError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "the", "of", "cardi", "my", *"abcdeorx", *(f"##{c}" for c in "abcdeiorx")]
MYCARDIA = ["##c", "##a", "##r", "##d", "##i", "##a"]  # inside a word the vocabulary is the old one
TEXT = "The cardio cardio CARDIO of Cardia, cardia. mycardia the the the the ж ж жa жa abba"


@pytest.fixture
def tokenizer(tmp_path: Path) -> BertTokenizerFast:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))


def test_the_most_frequent_words_that_are_split_are_appended(tokenizer: BertTokenizerFast, tmp_path: Path) -> None:
    """Lower case as the tokenizer's; not words of one piece, of unknown characters, or seen once."""
    both = add_words(tokenizer, [TEXT], 10)
    assert both.convert_ids_to_tokens(list(range(len(both)))) == [*WORDS, "cardio", "cardia"]
    one = add_words(tokenizer, reversed(TEXT.split()), 1)
    assert one.convert_ids_to_tokens(list(range(len(one)))) == [*WORDS, "cardio"]
    assert both.tokenize("The Cardio of cardia, mycardia") == [
        "the",
        "cardio",
        "of",
        "cardia",
        "[UNK]",
        "my",
        *MYCARDIA,
    ]
    assert (both.cls_token_id, both.mask_token_id) == (2, 4)
    both.save_pretrained(tmp_path / "saved")
    again = BertTokenizerFast.from_pretrained(tmp_path / "saved")
    assert again.get_vocab() == both.get_vocab()
    assert (tmp_path / "saved" / "vocab.txt").read_text(encoding="utf-8").split() == [*WORDS, "cardio", "cardia"]


def test_nothing_to_add_and_other_kinds_are_refused(tokenizer: BertTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"--add-vocabulary 5: the vocabulary has all words of the text as entries"):
        add_words(tokenizer, ["the of the of"], 5)
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="is no WordPiece vocabulary"):
        add_words(PreTrainedTokenizerFast(tokenizer_object=backend), ["the of"], 5)


def test_a_conversion_uses_the_words_that_it_adds(tokenizer: BertTokenizerFast, tmp_path: Path) -> None:
    """With any number of workers, and in the estimate of --dry-run too."""
    (tmp_path / "a.jsonl").write_bytes(jsonl([TEXT + " of" * number for number in range(8)]))
    vocabulary = str(tmp_path / "vocab.txt")

    def options(out: str, workers: int) -> Conversion:
        sources = Sources.of(str(tmp_path / "a.jsonl"))
        place = str(tmp_path / out)
        return Conversion(
            sources, place, vocabulary, add_vocabulary=2, max_seq_length=32, workers=workers, progress=False
        )

    for out, workers in (("one", 1), ("two", 2)):
        convert(options(out, workers))
    assert_same_files(tmp_path / "one", tmp_path / "two")
    entries = (tmp_path / "one/tokenizer/vocab.txt").read_text(encoding="utf-8").split()
    assert entries == [*WORDS, "cardio", "cardia"]
    used = {int(token) for row in rows_of(tmp_path / "one") for token in row["input_ids"]}
    assert {len(WORDS), len(WORDS) + 1} <= used
    assert dry_run(options("three", 1)).tokens > 0
