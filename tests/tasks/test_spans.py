"""Spans and their scores against their definitions, conlleval's rules written out, and seqeval's published examples."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from electra_composer.tasks.spans import (
    SpanTags,
    all_tags,
    guess_scheme,
    iob1_to_iob2,
    iob2_to_iob1,
    is_valid,
    join,
    parse,
)

Found = set[tuple[int, int, int, str]]  # sentence, start, end, label
TAGS = {scheme: all_tags(["B-X", "I-Y"], scheme) for scheme in ("iob2", "bioes")}


def by_definition(sentences: list[list[str]], scheme: str) -> Found:
    """Strict spans: try all parts of all sentences."""
    found = set()
    for number, tags in enumerate(sentences):
        for start, end in itertools.combinations(range(len(tags) + 1), 2):
            _, label = parse(tags[start])
            inside = [f"I-{label}"] * (end - start - 2)
            if scheme == "bioes":
                expected = [f"S-{label}"] if end - start == 1 else [f"B-{label}", *inside, f"E-{label}"]
                is_span = tags[start:end] == expected
            else:
                is_span = tags[start:end] == [f"B-{label}", *[f"I-{label}"] * (end - start - 1)]
                is_span = is_span and (end == len(tags) or tags[end] != f"I-{label}")
            if is_span:
                found.add((number, start, end, label))
    return found


def ends_chunk(before: str, tag: str, label_before: str, label: str) -> bool:
    """`endOfChunk` of conlleval.pl; with S, and all E, as in seqeval."""
    pairs = {"BB", "BO", "IB", "IO", "BS", "IS"}
    return before + tag in pairs or before in "ES" or (before != "O" and label_before != label)


def starts_chunk(before: str, tag: str, label_before: str, label: str) -> bool:
    """`startOfChunk` of conlleval.pl; with S as in seqeval."""
    pairs = {"BB", "IB", "OB", "OI", "EE", "EI", "OE", "EB", "SE", "SI", "SB"}
    return before + tag in pairs or tag == "S" or (tag != "O" and label_before != label)


def conlleval(true: list[list[str]], predicted: list[list[str]]) -> tuple[int, int, int]:
    """Numbers of correct, guessed and true chunks, counted as conlleval.pl does: one pass over the words."""
    correct = guessed = wanted = 0
    is_correct = False
    before = [("O", ""), ("O", "")]
    for gold, guess in zip(true, predicted, strict=True):
        for pair in [*zip(map(parse, gold), map(parse, guess), strict=True), (("O", ""), ("O", ""))]:
            ends = [ends_chunk(old[0], new[0], old[1], new[1]) for old, new in zip(before, pair, strict=True)]
            starts = [starts_chunk(old[0], new[0], old[1], new[1]) for old, new in zip(before, pair, strict=True)]
            if is_correct:
                if all(ends) and before[0][1] == before[1][1]:
                    is_correct = False
                    correct += 1
                elif ends[0] != ends[1] or pair[0][1] != pair[1][1]:
                    is_correct = False
            if all(starts) and pair[0][1] == pair[1][1]:
                is_correct = True
            wanted += starts[0]
            guessed += starts[1]
            before = list(pair)
    return correct, guessed, wanted


def encoded(sentences: list[list[str]], tags: list[str]) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.array([tags.index(tag) for sentence in sentences for tag in sentence], dtype=np.int64)
    return numbers, np.cumsum([0, *map(len, sentences)])


def find(sentences: list[list[str]], scheme: str, strict: bool) -> Any:
    return SpanTags(TAGS[scheme], scheme).find(*encoded(sentences, TAGS[scheme]), strict)


def fractions(correct: int, guessed: int, wanted: int) -> dict[str, float]:
    return {
        "precision": correct / guessed if guessed else 0.0,
        "recall": correct / wanted if wanted else 0.0,
        "f1": 2 * correct / (guessed + wanted) if guessed + wanted else 0.0,
    }


def pairs_of_sequences(scheme: str) -> st.SearchStrategy[Any]:
    pair = st.tuples(st.sampled_from(TAGS[scheme]), st.sampled_from(TAGS[scheme]))
    return st.lists(st.lists(pair, max_size=8), max_size=4)


@pytest.mark.parametrize("scheme", ["iob2", "bioes"])
def test_scores_are_those_of_sets_of_spans_and_of_conlleval(scheme: str) -> None:
    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(pairs_of_sequences(scheme))
    def check(pairs: list[list[tuple[str, str]]]) -> None:
        true, guess = ([[pair[side] for pair in sentence] for sentence in pairs] for side in (0, 1))
        gold, found = by_definition(true, scheme), by_definition(guess, scheme)
        scores = SpanTags(TAGS[scheme], scheme).scores(find(guess, scheme, True), find(true, scheme, True))
        expected = fractions(len(gold & found), len(found), len(gold))
        each = [
            fractions(*(len({span for span in spans if span[3] == label}) for spans in (gold & found, found, gold)))
            for label in sorted({span[3] for span in gold | found})
        ]
        expected["macro_f1"] = sum(each_f1["f1"] for each_f1 in each) / len(each) if each else 0.0
        assert scores == pytest.approx(expected)
        lenient = SpanTags(TAGS[scheme], scheme).scores(find(guess, scheme, False), find(true, scheme, False))
        del lenient["macro_f1"]
        assert lenient == pytest.approx(fractions(*conlleval(true, guess)))

    check()


def test_published_examples_of_seqeval() -> None:
    true = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    guess = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    tags = all_tags(itertools.chain(*true), "iob2")
    spans = SpanTags(tags, "iob2")
    for strict in (True, False):
        found = [spans.find(*encoded(sentences, tags), strict) for sentences in (guess, true)]
        assert spans.scores(*found) == {"f1": 0.5, "precision": 0.5, "recall": 0.5, "macro_f1": 0.5}
    # A span that begins with I: right for conlleval, none in strict IOB2.
    true, guess = [["B-NP", "I-NP", "O"]], [["I-NP", "I-NP", "O"]]
    tags = all_tags(true[0], "iob2")
    spans = SpanTags(tags, "iob2")
    strict, lenient = (
        spans.scores(*(spans.find(*encoded(sentences, tags), each) for sentences in (guess, true)))["f1"]
        for each in (True, False)
    )
    assert (strict, lenient) == (0.0, 1.0)


def test_a_span_ends_with_its_sentence() -> None:
    spans = SpanTags(TAGS["iob2"], "iob2")
    numbers, offsets = encoded([["O", "B-X"], [], ["I-X", "I-X", "O"]], TAGS["iob2"])
    assert spans.by_sentence(numbers, offsets) == [[(1, 2, "X")], [], [(0, 2, "X")]]
    strict = spans.find(numbers, offsets, strict=True)
    assert (strict.starts.tolist(), strict.ends.tolist()) == ([1], [2])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(TAGS["iob2"]), max_size=8))
def test_iob1_and_iob2_mark_the_same_spans(tags: list[str]) -> None:
    iob2 = iob1_to_iob2(tags)
    assert by_definition([iob2], "iob2") == {
        (0, int(start), int(end), "XY"[kind]) for start, end, kind in zip(*find([tags], "iob2", False), strict=True)
    }
    assert iob1_to_iob2(iob2_to_iob1(iob2)) == iob2
    # In IOB1 a span begins with B only after one of the same label.
    for before, tag in itertools.pairwise(["O", *iob2_to_iob1(iob2)]):
        assert tag[0] != "B" or before[1:] == tag[1:]


def test_the_scheme_is_guessed() -> None:
    def guessed(*sentences: str) -> str:
        return guess_scheme(Counter(pair for each in sentences for pair in itertools.pairwise(["O", *each.split()])))

    assert guessed("I-PER I-PER O I-LOC B-LOC", "O I-ORG") == "iob1"
    assert guessed("B-PER I-PER O B-LOC B-LOC", "O I-ORG") == "iob2"  # one tag is wrong
    assert guessed("B-PER E-PER O S-LOC") == "bioes"
    assert guessed("B I O B") == "iob2"  # spans without labels
    assert guessed("NOUN VERB O") == guessed("O O") == guessed("-LRB- X-Y") == "none"


def test_tags_have_a_prefix_and_a_label() -> None:
    for tag, parts in {"O": ("O", ""), "B": ("B", ""), "B-PER": ("B", "PER"), "I-a-b": ("I", "a-b")}.items():
        assert parse(tag) == parts
        assert join(*parts) == tag
    for tag in ("X", "PER", "B-", "b-PER", "O-PER"):
        assert not is_valid(tag, "bioes")
        with pytest.raises(ValueError, match=tag):
            parse(tag)
    assert is_valid("S-PER", "bioes")
    assert not is_valid("S-PER", "iob2")
    assert all_tags(["I-PER", "O", "B-LOC"], "iob2") == ["O", "B-LOC", "B-PER", "I-LOC", "I-PER"]
    assert all_tags(["B", "O"], "iob1") == ["O", "B", "I"]
