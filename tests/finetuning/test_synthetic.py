"""Synthetic task: sentence extraction, corruption, and separate train and dev sets."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from electra_composer.errors import UserError
from electra_composer.finetuning import synthetic
from electra_composer.finetuning.files import read_examples
from electra_composer.finetuning.tasks import TASKS

SENTENCE = "The quick brown fox (so they say) jumps over lazy dogs, and then sleeps for some hours."
NOUNS = ["array", "matrix", "graph", "kernel", "tensor", "file", "table", "figure", "parser", "socket"]
VERBS = ["returns", "computes", "reads", "shows", "builds", "checks", "moves", "joins"]


def documents(count: int) -> list[str]:
    """Make documents of five different sentences; every sentence contains the document's name."""
    rng = random.Random(0)
    texts = []
    for number in range(count):
        name = "".join("abcdefghij"[int(digit)] for digit in f"{number:05d}")
        lines = [
            f"Here the {rng.choice(NOUNS)} of doc{name} {rng.choice(VERBS)} every {rng.choice(NOUNS)} that "
            f"some other {rng.choice(NOUNS)} {rng.choice(VERBS)} before part{'xyzvw'[i]}."
            for i in range(5)
        ]
        texts.append(" ".join(lines))
    return texts


def document_of(sentence: str) -> str:
    return next(word for word in sentence.split() if word.startswith("doc"))


def test_sentences_are_prose_of_eight_to_thirty_words() -> None:
    text = (
        "Too short here. This sentence has more than eight plain words in\nit and is kept. "
        "X = foo(1, 2) + bar[3] * baz{4} % 5 ** 6 // 7 is code.\n\n"
        "Blank lines end a sentence that does not end itself\n\n" + "long " * 40 + "one."
    )
    assert list(synthetic.sentences(text)) == ["This sentence has more than eight plain words in it and is kept."]


WORDS = ["apple", "brown", "cherry"]


def test_corruption_replaces_plain_words_alone() -> None:
    whole = SENTENCE.split()
    for seed in range(50):
        corrupted = synthetic.corrupt(SENTENCE, WORDS, random.Random(seed))
        assert corrupted is not None
        words = corrupted.split()
        assert len(words) == len(whole)
        assert words[0] == "The"
        assert all(words[i] == whole[i] for i in range(len(whole)) if not whole[i].isalpha())
        replaced = [a for a, b in zip(words, whole, strict=True) if a != b]
        assert len(replaced) == 3  # 12 replaceable words × 0.25
        assert set(replaced) <= set(WORDS)


def test_a_sentence_with_one_word_to_replace_is_not_corrupted() -> None:
    assert synthetic.corrupt("One two, (3) four.", WORDS, random.Random(0)) is None


def test_replacing_words_occur_twice_and_once_in_the_list() -> None:
    assert synthetic.vocabulary(["Bb aa, aa bb cc", "Cc dd bb"]) == ["bb", "cc"]  # "aa," has punctuation


def test_sets_are_balanced_and_share_neither_sentences_nor_documents() -> None:
    train, dev = synthetic.build(documents(200), 300, 101, seed=1)
    assert (len(train), len(dev)) == (300, 100)
    for part in (train, dev):
        assert Counter(example.label for example in part) == {0: len(part) // 2, 1: len(part) // 2}
    documents_of = [{document_of(e.sentence) for e in part if e.label} for part in (train, dev)]  # original sentences
    assert not documents_of[0] & documents_of[1]
    assert len({example.sentence for example in train + dev}) == len(train) + len(dev)
    originals = {sentence for text in documents(200) for sentence in synthetic.sentences(text)}
    assert all((example.sentence in originals) == bool(example.label) for example in train + dev)


def test_the_seed_decides() -> None:
    assert synthetic.build(documents(60), 100, 20, 1) == synthetic.build(documents(60), 100, 20, 1)
    assert synthetic.build(documents(60), 100, 20, 1) != synthetic.build(documents(60), 100, 20, 2)


def test_repeated_sentences_are_used_once_and_too_little_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"sentences of 6 to 18 words for (train|dev); expected \d+"):
        synthetic.build(documents(3) * 100, 300, 100, seed=0)
    with pytest.raises(UserError, match="expected 2"):
        synthetic.build(documents(50), 0, 10, seed=0)


def test_command_line_writes_what_glue_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "texts.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(100)))
    arguments = ["--source", str(source), "--out", str(out), "--train", "100", "--dev", "40"]
    synthetic.main(arguments)
    assert "synthetic task" in capsys.readouterr().out
    task = TASKS["synthetic-words"]
    assert len(read_examples(task, "train", str(out))) == 100
    assert Counter(example.label for example in read_examples(task, "dev", str(out))) == {0: 20, 1: 20}
    assert json.loads((out / "synthetic-words" / "about.json").read_text())["synthetic"] is True
    with pytest.raises(UserError, match="exists already"):
        synthetic.main(arguments)


def test_nothing_is_left_looking_whole_where_there_is_too_little_text(tmp_path: Path) -> None:
    source, out = tmp_path / "texts.jsonl", tmp_path / "out"
    source.write_text(json.dumps({"text": SENTENCE}) + "\n")
    with pytest.raises(UserError, match="give more text"):
        synthetic.main(["--source", str(source), "--out", str(out)])
    assert not (out / "synthetic-words").exists()
