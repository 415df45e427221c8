"""Tokenizers: what identifies one, what is refused, and that training gives the same vocabulary in every process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, ElectraTokenizerFast

from electra_composer.errors import UserError
from electra_composer.vocabulary import load_tokenizer, special_ids, train_tokenizer, vocabulary_sha256

BERT = Path(__file__).parents[1] / "../shared/data/bert-base-uncased-vocab.txt"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXT = [
    "The cat sat on the mat; the bat sat on the cat's hat. Éclair!",
    "Unbelievable, unbeatable, believable beats.",
] * 5


def write(path, tokens):
    path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return str(path)


@pytest.mark.skipif(not BERT.exists(), reason="needs the vocabulary of BERT in ../shared/data")
def test_hash_is_that_of_the_vocabulary_file():
    tokenizer = load_tokenizer(str(BERT))
    expected = hashlib.sha256(BERT.read_bytes()).hexdigest()
    assert expected.startswith("07eced37")
    assert vocabulary_sha256(tokenizer) == expected
    assert special_ids(tokenizer) == {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}
    assert tokenizer.tokenize("Hello Wörld, unaffable!") == ["hello", "world", ",", "una", "##ffa", "##ble", "!"]


def test_vocabulary_file(tmp_path):
    path = tmp_path / "vocab.txt"
    tokenizer = load_tokenizer(write(path, [*SPECIAL, "cat", "##s"]))
    assert isinstance(tokenizer, ElectraTokenizerFast)
    assert tokenizer("Cats")["input_ids"] == [2, 5, 6, 3]
    assert vocabulary_sha256(tokenizer) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_hash_tells_order_and_gaps_apart(tmp_path):
    one = load_tokenizer(write(tmp_path / "a.txt", [*SPECIAL, "cat", "dog"]))
    two = load_tokenizer(write(tmp_path / "b.txt", [*SPECIAL, "dog", "cat"]))
    assert vocabulary_sha256(one) != vocabulary_sha256(two)
    one.add_tokens(["bird"])
    assert (
        vocabulary_sha256(one) == hashlib.sha256("\n".join([*SPECIAL, "cat", "dog", "bird", ""]).encode()).hexdigest()
    )


def test_folder_comes_back_as_the_same_tokenizer(tmp_path):
    tokenizer = train_tokenizer(TEXT, 120)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for again in (load_tokenizer(str(tmp_path / "tokenizer")), AutoTokenizer.from_pretrained(tmp_path / "tokenizer")):
        assert isinstance(again, ElectraTokenizerFast)
        assert vocabulary_sha256(again) == vocabulary_sha256(tokenizer)
        assert again(TEXT[0])["input_ids"] == tokenizer(TEXT[0])["input_ids"]


def test_trained_vocabulary():
    tokenizer = train_tokenizer(TEXT, 120)
    assert tokenizer.convert_ids_to_tokens(range(5)) == SPECIAL
    assert special_ids(tokenizer) == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert len(tokenizer) <= 120
    tokens = tokenizer.tokenize(TEXT[0])
    assert tokens[:2] == ["the", "cat"]  # frequent words become one piece, in lower case
    assert "[UNK]" not in tokens
    assert tokenizer.tokenize("éclair") == tokenizer.tokenize("ECLAIR")  # accents are stripped
    # What special tokens look like in a text to train on is text: the five are there once, as special tokens.
    assert sorted(t for t in tokenizer.get_vocab() if t.startswith("[") and len(t) > 1) == sorted(SPECIAL)


def test_training_does_not_depend_on_the_order_of_texts():
    assert vocabulary_sha256(train_tokenizer(TEXT, 120)) == vocabulary_sha256(train_tokenizer(TEXT[::-1], 120))


@pytest.mark.slow
def test_training_is_the_same_in_every_process(tmp_path):
    # With as many ties as this text has, the trainer of `tokenizers` alone gives other ids in each process.
    program = (
        "import inspect, random; from electra_composer import vocabulary as v;"
        "text = [inspect.getsource(random), inspect.getsource(inspect)];"
        "print(v.vocabulary_sha256(v.train_tokenizer(text, 2000)))"
    )
    hashes = set()
    for parallelism in ("true", "false"):
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": parallelism}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
        )
        hashes.add(done.stdout.split()[-1])
    assert len(hashes) == 1


def test_alphabet_keeps_the_most_frequent_characters(monkeypatch):
    monkeypatch.setattr("electra_composer.vocabulary.MAX_ALPHABET", 3)
    vocabulary = train_tokenizer(["aaa bbb ccc abc bca zq qz"], 40).get_vocab()
    assert {"a", "b", "c", "##a", "##b", "##c"} <= set(vocabulary)
    assert not {"z", "##z", "q", "##q"} & set(vocabulary)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([t for t in SPECIAL if t != "[MASK]"], r"no line \[MASK\] among its 4"),
        ([*SPECIAL, "cat", "cat"], "'cat' stands there more than once"),
    ],
)
def test_wrong_vocabulary_files_are_refused(tmp_path, tokens, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(write(tmp_path / "vocab.txt", tokens))


def test_binary_file_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a readable UTF-8 vocabulary file"):
        load_tokenizer(str(tmp_path / "vocab.txt"))


def test_what_is_not_there_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file or folder"):
        load_tokenizer(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="a folder, but not of a tokenizer"):
        load_tokenizer(str(tmp_path / "empty"))
    monkeypatch.setattr("electra_composer.vocabulary._hub_answers", lambda name: False)
    with pytest.raises(UserError, match="no file or folder here, and not had from the hub"):
        load_tokenizer("nobody/has-this-tokenizer")


def test_tokenizer_without_what_electra_needs_is_refused(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "vocab.txt", [*SPECIAL, "cat"]))
    tokenizer.mask_token = None
    with pytest.raises(UserError, match=r"has no \[MASK\] token; ELECTRA needs"):
        special_ids(tokenizer, "mine")


def test_too_small_or_empty_training_is_refused():
    with pytest.raises(UserError, match="vocab_size is 10; this text needs at least"):
        train_tokenizer(TEXT, 10)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(["  "], 100)
