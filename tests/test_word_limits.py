"""WordPiece splits words of up to 200 characters, as BERT's code does; tokenizers of older shards keep their limit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from small_streams import config, write_stream
from transformers import AutoTokenizer
from transformers.models.bert.tokenization_bert import WordpieceTokenizer

from electra_composer.batches.row_reader import reader_of_split
from electra_composer.batches.shards import read_data, read_meta
from electra_composer.batches.streams import describe_streams
from electra_composer.checkpoints.weights import tokenizer_files
from electra_composer.corpus.conversion import Conversion, convert
from electra_composer.corpus.sources import Sources
from electra_composer.corpus.tokenizer import load_given
from electra_composer.preview import describe_meta
from electra_composer.vocabulary import load_tokenizer, train_tokenizer
from electra_composer.word_limits import use_word_limit, word_limit

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##a", "##aa", "cat"]
LENGTHS = [1, 2, 99, 100, 101, 150, 199, 200, 201, 500]


@pytest.fixture
def vocabulary(tmp_path: Path) -> str:
    path = tmp_path / "vocab.txt"
    path.write_text("".join(f"{token}\n" for token in TOKENS))
    return str(path)


def limited(folder: Path, vocabulary: str, limit: int = 100) -> Path:
    """Write a tokenizer with a limit, as the files on the hub and those of older shards have it."""
    tokenizer = load_tokenizer(vocabulary)
    tokenizer.backend_tokenizer.model.max_input_chars_per_word = limit
    tokenizer.save_pretrained(folder)
    return folder


def given(tokenizer: object) -> Conversion:
    return Conversion(tokenizer=str(tokenizer))


@pytest.mark.parametrize("length", LENGTHS)
def test_pieces_of_long_words_are_those_of_berts_code(vocabulary: str, tmp_path: Path, length: int) -> None:
    """Saved and loaded again too. transformers' WordpieceTokenizer is the original's, in Python."""
    tokenizer = load_tokenizer(vocabulary)
    twin = WordpieceTokenizer(tokenizer.get_vocab(), "[UNK]", max_input_chars_per_word=200)
    expected = twin.tokenize("a" * length)
    assert (expected == ["[UNK]"]) == (length > 200)
    assert tokenizer.tokenize("cat " + "A" * length) == ["cat", *expected]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).tokenize("a" * length) == expected
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").tokenize("a" * length) == expected


def test_trained_vocabularies_and_checkpoints_have_the_limit(vocabulary: str) -> None:
    text = ["aa ab ba bb " * 9] * 3
    for tokenizer in (train_tokenizer(text, 60), load_tokenizer(vocabulary)):
        content = json.loads(tokenizer_files(tokenizer)["tokenizer.json"])
        assert content["model"]["max_input_chars_per_word"] == 200


def test_a_given_tokenizer_of_the_hubs_kind_takes_it(vocabulary: str, tmp_path: Path) -> None:
    """The default tokenizer of a conversion is a name on the hub, whose file says 100."""
    folder = limited(tmp_path / "tokenizer", vocabulary)
    assert word_limit(str(folder)) == 100
    assert load_tokenizer(str(folder)).tokenize("a" * 150) == ["[UNK]"]  # a run uses what is saved
    for path in (folder, folder / "tokenizer.json"):
        tokenizer = load_given(given(path))
        assert tokenizer is not None
        assert len(tokenizer.tokenize("a" * 150)) == 76
    own = load_given(given(limited(tmp_path / "own", vocabulary, limit=7)))
    assert own is not None
    assert own.tokenize("a" * 8) == ["[UNK]"]


def test_the_tokenizer_of_a_folder_of_shards_stays_as_it_is(vocabulary: str, tmp_path: Path) -> None:
    limited(tmp_path / "shards/tokenizer", vocabulary)
    (tmp_path / "shards/meta.json").write_text("{}")
    for end in ("tokenizer", "tokenizer/", "tokenizer/tokenizer.json"):
        tokenizer = load_given(given(f"{tmp_path}/shards/{end}"))
        assert tokenizer is not None
        assert tokenizer.tokenize("a" * 150) == ["[UNK]"], end


def test_shards_say_their_limit(vocabulary: str, tmp_path: Path) -> None:
    """150 characters are pieces in the shards, and the preview names the limit."""
    (tmp_path / "text.txt").write_text("cat " + "a" * 150 + "\n\n" + "cat " + "a" * 201)
    out = str(tmp_path / "out")
    convert(Conversion(Sources.of(str(tmp_path / "text.txt")), out, vocabulary, val_fraction=0.0, progress=False))
    reader = reader_of_split(out, "train")
    assert reader is not None
    ids = reader.read(np.arange(reader.rows)).input_ids.tolist()
    assert ids.count(TOKENS.index("##aa")) == 74
    assert ids.count(TOKENS.index("[UNK]")) == 1
    assert "words of at most 200 characters" in describe_meta(read_meta(out))


def test_streams_of_two_limits_are_named(vocabulary: str, tmp_path: Path) -> None:
    """They are read together: only words of 101 to 200 characters differ."""
    tokenizer = load_tokenizer(vocabulary)
    for name in "ab":
        write_stream(tmp_path / name, tokenizer, name)
    options = config(tmp_path, {"a": {}, "b": {}})
    assert "[UNK]" not in str(describe_streams(options, read_data(options), seed=3))
    limited(tmp_path / "b/tokenizer", vocabulary)
    assert "is [UNK]: 200 in a, 100 in b;" in str(describe_streams(options, read_data(options), seed=3))


def test_other_kinds_of_tokenizers_have_no_limit(tmp_path: Path) -> None:
    assert word_limit(str(tmp_path)) is None
    for content in ("{", "[]", '{"model": {"type": "Unigram"}}', '{"model": {"type": "WordPiece"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        assert word_limit(str(tmp_path)) is None


def test_another_model_is_left_alone() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    before = backend.to_str()
    use_word_limit(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert backend.to_str() == before
