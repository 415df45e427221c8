"""Tests of vocabulary.py: hashes, refused tokenizers, deterministic training, other scripts and tokenizer types."""

from __future__ import annotations

import hashlib
import inspect
import os
import random
import subprocess
import sys

import pytest
from tiny import SHARED_DATA
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, ElectraTokenizerFast, PreTrainedTokenizerFast, XLMRobertaTokenizerFast

from electra_composer.checkpoints.weights import tokenizer_files
from electra_composer.errors import UserError
from electra_composer.vocabulary import load_tokenizer, special_ids, train_tokenizer, vocabulary_sha256

BERT = SHARED_DATA / "bert-base-uncased-vocab.txt"
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
    assert tokens[:2] == ["the", "cat"]  # frequent words become one lower-case piece
    assert "[UNK]" not in tokens
    assert tokenizer.tokenize("éclair") == tokenizer.tokenize("ECLAIR")  # accents are stripped
    # A special token written in the training text is ordinary text: each of the five has one entry.
    assert sorted(t for t in tokenizer.get_vocab() if t.startswith("[") and len(t) > 1) == sorted(SPECIAL)


def test_training_does_not_depend_on_the_order_of_texts():
    assert vocabulary_sha256(train_tokenizer(TEXT, 120)) == vocabulary_sha256(train_tokenizer(TEXT[::-1], 120))


@pytest.mark.slow
def test_training_is_the_same_in_every_process(tmp_path):
    # This text has so many ties that the trainer of `tokenizers` alone gives different ids in each process.
    program = (
        "import inspect, random; from electra_composer import vocabulary as v;"
        "text = [inspect.getsource(random), inspect.getsource(inspect)];"
        "print(v.vocabulary_sha256(v.train_tokenizer(text, 2000)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "true"},  # here it is false
        cwd=tmp_path,
    )
    text = [inspect.getsource(random), inspect.getsource(inspect)]
    assert done.stdout.split()[-1] == vocabulary_sha256(train_tokenizer(text, 2000))


def test_alphabet_keeps_the_most_frequent_characters(monkeypatch):
    monkeypatch.setattr("electra_composer.vocabulary.ALPHABET", 3)
    monkeypatch.setattr("electra_composer.vocabulary.COVERAGE", 0.7)
    vocabulary = train_tokenizer(["aaa bbb ccc abc bca zq qz"], 40).get_vocab()
    assert {"a", "b", "c", "##a", "##b", "##c"} <= set(vocabulary)
    assert not {"z", "##z", "q", "##q"} & set(vocabulary)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([t for t in SPECIAL if t != "[MASK]"], r"none of its 4 lines is \[MASK\]"),
        ([*SPECIAL, "cat", "cat"], "'cat' occurs more than once"),
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
    with pytest.raises(UserError, match="the folder holds no tokenizer"):
        load_tokenizer(str(tmp_path / "empty"))
    monkeypatch.setattr("electra_composer.vocabulary._hub_answers", lambda name: False)
    with pytest.raises(
        UserError,
        match=r"no such file or folder; the Hugging Face Hub cannot be reached, .* Connect to the network, or",
    ):
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


# Other languages and tokenizer types


def byte_level_bpe(special, size=300):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


@pytest.mark.parametrize(
    ("special", "ids"),
    [
        (["<pad>", "<s>", "</s>", "<mask>"], {"pad": 0, "cls": 1, "sep": 2, "mask": 3}),
        (["[MASK]", "[UNK]", "[SEP]", "[CLS]", "[PAD]"], {"pad": 4, "unk": 1, "cls": 3, "sep": 2, "mask": 0}),
    ],
)
def test_a_file_of_tokenizers(tmp_path, special, ids):
    backend = byte_level_bpe(special)
    backend.save(str(tmp_path / "mine.json"))
    tokenizer = load_tokenizer(str(tmp_path / "mine.json"))
    assert special_ids(tokenizer) == ids
    assert tokenizer(TEXT[0], add_special_tokens=False)["input_ids"] == backend.encode(TEXT[0]).ids
    tokenizer.save_pretrained(tmp_path / "folder")
    again = load_tokenizer(str(tmp_path / "folder"))
    assert special_ids(again) == ids
    assert vocabulary_sha256(again) == vocabulary_sha256(tokenizer)
    assert again(TEXT[0])["input_ids"] == tokenizer(TEXT[0])["input_ids"]


def test_special_tokens_can_be_added(tmp_path):
    """The recipe of docs/languages.md."""
    byte_level_bpe(["<pad>"]).save(str(tmp_path / "mine.json"))
    with pytest.raises(UserError, match=r"has no \[CLS\] and no \[SEP\] and no \[MASK\] token.*docs/languages"):
        load_tokenizer(str(tmp_path / "mine.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "mine.json"), pad_token="<pad>")
    before = len(tokenizer)
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"})
    tokenizer.save_pretrained(tmp_path / "folder")
    again = load_tokenizer(str(tmp_path / "folder"))
    assert len(again) == before + 3
    assert special_ids(again) == {"pad": 0, "cls": before, "sep": before + 1, "mask": before + 2}


def test_files_that_are_none_of_tokenizers_are_refused(tmp_path):
    for text in ("", "{}", "[PAD]\n[UNK]\n"):
        (tmp_path / "mine.json").write_text(text)
        with pytest.raises(UserError, match="not a file saved by `tokenizers`"):
            load_tokenizer(str(tmp_path / "mine.json"))
    byte_level_bpe(["<pad>", "<s>", "</s>", "<mask>"]).save(str(tmp_path / "mine.json"))
    with pytest.raises(UserError, match="defines case and accents itself"):
        load_tokenizer(str(tmp_path / "mine.json"), cased=True)


def test_ids_with_gaps_are_refused(tmp_path):
    model = models.WordPiece({**{token: i for i, token in enumerate(SPECIAL)}, "cat": 9}, unk_token="[UNK]")
    Tokenizer(model).save(str(tmp_path / "mine.json"))
    with pytest.raises(UserError, match="has 6 entries, but ids up to 9; expected ids without gaps"):
        load_tokenizer(str(tmp_path / "mine.json"))


def test_alphabets_of_thousands_of_characters():
    """As many characters as cover the text get entries, if room for words remains."""
    ideographs = [chr(0x4E00 + index) for index in range(3000)]
    text = [" ".join(ideographs), " ".join(ideographs[:2500]) * 20, "word " * 100]
    known = set(train_tokenizer(text, 30_000, keep_accents=True).get_vocab())
    assert set(ideographs[:2500]) <= known
    assert len(set(ideographs) & known) > 2900  # the rest is less than 0.05% of the text
    small = set(train_tokenizer(text, 4800, keep_accents=True).get_vocab())
    assert 1150 <= len(set(ideographs) & small) <= 1200


@pytest.mark.parametrize(
    ("text", "loses"),
    [
        ("ภาษาไทยไม่มีช่องว่างระหว่างคำ", True),
        ("नदी के किनारे एक छोटा गाँव है", True),
        ("がぎぐげご パピプペポ", True),
        ("강가에 작은 마을이 있다", True),
        ("Ein Wörterbuch für Größe und Übermut", False),
        ("Το ποτάμι περνά κάτω από το χωριό", False),
        ("Příliš žluťoučký кон́ь", False),
        ("مَرْحَبًا שָׁלוֹם", False),
    ],
)
def test_scripts_that_need_their_marks_are_warned_of(text, loses, capsys):
    for options, warned in (({}, loses), ({"keep_accents": True}, False), ({"cased": True}, False)):
        tokenizer = train_tokenizer([f"{text}\n"] * 3, 400, **options)
        assert ("--keep-accents" in capsys.readouterr().err) == warned
    assert "[UNK]" not in tokenizer.tokenize(text)


def test_a_tokenizer_with_binary_files_goes_into_a_checkpoint(tmp_path, monkeypatch):
    """Folders such as XLM-R's also hold a SentencePiece model, which a fast tokenizer does not need."""
    monkeypatch.setattr(XLMRobertaTokenizerFast, "slow_tokenizer_class", object)  # as where sentencepiece is installed
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "▁a", "b"]
    model = models.Unigram([(name, -1.0) for name in names], unk_id=3)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"\xff\xfe\x00model")
    tokenizer = XLMRobertaTokenizerFast(
        vocab_file=str(tmp_path / "sentencepiece.bpe.model"), tokenizer_file=str(tmp_path / "tokenizer.json")
    )
    files = tokenizer_files(tokenizer)
    (tmp_path / "again").mkdir()
    for name, text in files.items():
        (tmp_path / "again" / name).write_text(text, encoding="utf-8")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("ab b")["input_ids"] == tokenizer("ab b")["input_ids"]
