"""Examples against the rules of ELECTRA's original code: worked by hand, and a second, slow implementation."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from electra_composer.corpus.examples import ExampleBuilder, split_sentences

CLS, SEP = 101, 102


class Script:
    """A random generator with predetermined draws, which must be used in order."""

    def __init__(self, *draws: float | tuple[int, int, int]) -> None:
        self.draws = list(draws)

    def random(self) -> float:
        draw = self.draws.pop(0)
        assert isinstance(draw, float), f"random() was called where randint{draw} was expected"
        return draw

    def randint(self, low: int, high: int) -> int:
        draw = self.draws.pop(0)
        assert isinstance(draw, tuple), "randint() was called where random() was expected"
        assert draw[:2] == (low, high)
        return draw[2]


def build(lines_of_documents, length, rng, overflow="cut"):
    builder = ExampleBuilder(length, CLS, SEP, rng, overflow)
    examples = []
    for lines in lines_of_documents:
        for line in lines:
            examples.extend(builder.add_line(line))
        examples.extend(builder.end_document())
    return examples, builder


def plain(examples):
    return [(list(map(int, e.ids)), e.length_a, e.length_b) for e in examples]


def numbers(start, count):
    return list(range(start, start + count))


def test_worked_by_hand():
    # Maximum 20: the target is 20, and that of the first segment (20 - 3) // 2 = 8 tokens.
    rng = Script(
        *(0.5, 0.9, 0.99),  # two segments; 5 + 6 overflows A: 0.9 → B; next target is the maximum
        *(0.5, 0.1, 0.01, (5, 20, 7)),  # two segments; 5 + 6 overflows A: 0.1 → A nevertheless; next target 7
        *(0.05, 0.99),  # one segment: both lines go to A without a draw
        *(0.5, 0.99),  # end of the document
        *(0.5, 0.99),  # the other document
    )
    document = [
        # Example 1: 5 → A (empty); 6: 5 + 6 ≥ 8, may go to either → B; 2: 5 + 2 < 8 → A, although B has begun; 7 → B.
        numbers(1000, 5), numbers(2000, 6), numbers(3000, 2), numbers(4000, 7),
        # Example 2: 5 → A; 6 may go to either → A (11); 9: A has its target, no draw → B, cut to 20 - 11 - 3 = 6.
        numbers(1100, 5), numbers(2100, 6), numbers(3100, 9),
        # Example 3, target 7: 3 then 4 tokens reach it.
        numbers(1200, 3), numbers(2200, 4),
        # Example 4, the rest: 4 tokens. A's target is (20 - 3) // 2 = 8.
        numbers(1300, 4),
    ]  # fmt: skip
    examples, builder = build([document, [[7, 8]]], 20, rng)
    assert plain(examples) == [
        # A = 5 + 2 = 7 tokens; B = 6 + 7 = 13, cut to 20 - 7 - 3 = 10
        ([CLS, *numbers(1000, 5), *numbers(3000, 2), SEP, *numbers(2000, 6), *numbers(4000, 4), SEP], 9, 11),
        ([CLS, *numbers(1100, 5), *numbers(2100, 6), SEP, *numbers(3100, 6), SEP], 13, 7),
        ([CLS, *numbers(1200, 3), *numbers(2200, 4), SEP], 9, 0),
        ([CLS, *numbers(1300, 4), SEP], 6, 0),
        ([CLS, 7, 8, SEP], 4, 0),
    ]
    assert rng.draws == []
    assert builder.dropped_tokens == 3 + 3


def test_one_line_longer_than_the_row_is_cut_to_one_segment():
    examples, builder = build([[numbers(1000, 50)]], 20, Script(0.5, 0.99))
    assert plain(examples) == [([CLS, *numbers(1000, 18), SEP], 20, 0)]
    assert builder.dropped_tokens == 32


def test_second_segment_without_room_is_left_out():
    # A takes 18 of 20 - 2; B would have max(0, 20 - 18 - 3) = 0 tokens: no second [SEP].
    examples, builder = build([[numbers(1000, 19), numbers(2000, 5)]], 20, Script(0.5, 0.99))
    # 19 tokens are below the target of 20, so the second line joins the same example.
    assert plain(examples) == [([CLS, *numbers(1000, 18), SEP], 20, 0)]
    assert builder.dropped_tokens == 1 + 5


def test_a_target_too_short_for_a_second_segment():
    # Target 5: A's target is (5 - 3) // 2 = 1 token, which the first line exceeds; the next goes to B without a draw.
    rng = Script(0.5, 0.01, (5, 20, 5), 0.5, 0.99)
    examples, _ = build([[numbers(1000, 20), numbers(2000, 3), numbers(3000, 3)]], 20, rng)
    assert plain(examples)[1] == ([CLS, *numbers(2000, 3), SEP, *numbers(3000, 3), SEP], 5, 4)
    assert rng.draws == []


def test_carry_loses_nothing_and_starts_the_next_example():
    rng = Script(*(0.5, 0.99) * 3)
    examples, builder = build([[numbers(1000, 50)], []], 20, rng, "carry")
    assert plain(examples) == [
        ([CLS, *numbers(1000, 18), SEP], 20, 0),
        ([CLS, *numbers(1018, 18), SEP], 20, 0),
        ([CLS, *numbers(1036, 14), SEP], 16, 0),
    ]
    assert builder.dropped_tokens == 0
    assert rng.draws == []


def reference(documents, length, rng):
    """A second implementation of the rules, with plain lists, one token at a time."""
    result, target = [], length
    for lines in documents:
        waiting = []
        for number, line in enumerate(lines):
            if line:
                waiting.append(line)
            size = sum(len(x) for x in waiting)
            last = number == len(lines) - 1
            if not waiting or (size < target and not last):
                continue
            aim = 100000 if rng.random() < 0.1 else (target - 3) // 2
            a, b = [], []
            for sentence in waiting:
                if not a or len(a) + len(sentence) < aim:
                    where = a
                elif not b and len(a) < aim:
                    where = a if rng.random() < 0.5 else b
                else:
                    where = b
                for token in sentence:
                    where.append(token)
            while len(a) > length - 2:
                a.pop()
            while b and len(a) + len(b) > length - 3:
                b.pop()
            target = rng.randint(5, length) if rng.random() < 0.05 else length
            waiting = []
            result.append(([CLS, *a, SEP, *b, *([SEP] if b else [])], len(a) + 2, len(b) + 1 if b else 0))
    return result


def random_documents(rng, count, line_length, lines):
    """Return documents in which every token identifies its document."""
    return [
        [[1000 + number] * rng.randint(0, line_length) for _ in range(rng.randint(1, lines))] for number in range(count)
    ]


@pytest.mark.parametrize("length", [5, 16, 128])
def test_agrees_with_a_second_implementation(length):
    documents = random_documents(random.Random(length), 400, 30, 20)
    examples, builder = build(documents, length, random.Random(7))
    expected = reference(documents, length, random.Random(7))
    assert plain(examples) == expected
    tokens = sum(len(line) for document in documents for line in document)
    kept = sum(sum(1 for i in ids if i not in (CLS, SEP)) for ids, _, _ in expected)
    assert builder.dropped_tokens == tokens - kept


@pytest.mark.parametrize("overflow", ["cut", "carry"])
def test_shape_of_every_example(overflow):
    documents = random_documents(random.Random(1), 500, 60, 30)
    examples, _ = build(documents, 64, random.Random(2), overflow)
    for example in examples:
        ids = example.ids.tolist()
        assert len(ids) == example.length_a + example.length_b <= 64
        assert ids[0] == CLS
        assert ids[example.length_a - 1] == ids[-1] == SEP
        specials = Counter(i for i in ids if i in (CLS, SEP))
        assert specials == {CLS: 1, SEP: 2 if example.length_b else 1}
        assert len({i for i in ids if i not in (CLS, SEP)}) == 1, "an example crosses documents"
    if overflow == "carry":
        words = Counter(int(i) for example in examples for i in example.ids if i not in (CLS, SEP))
        assert words == Counter(token for document in documents for line in document for token in line)


def test_one_segment_and_short_targets_come_as_often_as_they_should():
    # One endless document of one-token lines: every example reaches its target exactly, before [CLS] and [SEP].
    builder = ExampleBuilder(64, CLS, SEP, random.Random(3))
    one = [1000]
    examples = []
    while len(examples) < 20_000:
        examples.extend(builder.add_line(one))
    one_segment = np.mean([e.length_b == 0 for e in examples])
    # A target of t gives t + 3 tokens in two segments or t + 2 in one, both cut to 64.
    short = np.mean([len(e.ids) < 64 for e in examples])
    sizes = [len(e.ids) for e in examples if len(e.ids) < 64]
    # Even a target of 5 leaves lines for a second segment, so that one example in ten has a single segment.
    assert abs(one_segment - 0.1) < 4 * (0.1 * 0.9 / len(examples)) ** 0.5
    # Of the 60 targets from 5 to 64, those up to 60 give less than 64 with two segments, those up to 61 with one.
    assert abs(short - 0.05 * 56.1 / 60) < 4 * (0.05 * 0.95 / len(examples)) ** 0.5
    assert min(sizes) >= 7
    assert np.mean(sizes) == pytest.approx(35.5, abs=2)  # uniform from 5 + 3 to 63


def test_lengths_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="expected at least 5"):
        ExampleBuilder(4, CLS, SEP, random.Random(0))
    with pytest.raises(ValueError, match="'cut' or 'carry'"):
        ExampleBuilder(8, CLS, SEP, random.Random(0), "drop")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sentences",
    [
        ["川は流れる。", "「本当に？」", "と聞いた！！", "「はい。」", "終わり"],
        ["नदी बहती है।", "गाँव छोटा है।"],
        ["هل هذا بيت؟", "نعم."],
    ],
)
@pytest.mark.parametrize("space", ["", " "])
def test_sentences_of_other_scripts(sentences, space):
    if sentences[0][-1] != "。" and not space:  # only Chinese and Japanese need no spaces
        assert split_sentences("".join(sentences)) == ["".join(sentences)]
    else:
        assert split_sentences(space.join(sentences)) == sentences


def test_sentences_of_ascii_text_do_not_depend_on_what_else_is_in_it():
    text = "".join(np.random.default_rng(0).choice([*"abA.!?\"')] ", "fine.Then"], 3000).tolist())
    assert split_sentences(f"é. {text}")[1:] == split_sentences(text)
    assert len(split_sentences(text)) > 100


def test_sentences():
    text = 'It was fine.Then "it broke." Why?  Nobody (not one!) knows: 3.5 of 4, e.g. me. The end'
    assert split_sentences(text) == [
        "It was fine.",
        'Then "it broke."',
        "Why?",
        "Nobody (not one!)",
        "knows: 3.5 of 4, e.g.",
        "me.",
        "The end",
    ]
    assert split_sentences("“Is it?” «Yes.» It is…  Good") == ["“Is it?”", "«Yes.»", "It is…", "Good"]
    assert split_sentences("  ") == []
    assert split_sentences("no end") == ["no end"]
