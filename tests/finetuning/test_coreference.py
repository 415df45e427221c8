"""Finding the pronoun and its candidates in premise and hypothesis."""

from __future__ import annotations

import random

import pytest

from electra_composer.finetuning.coreference import DETERMINERS, PRONOUNS, find_blank

CASES = [
    (
        "I stuck a pin through a carrot. When I pulled the pin out, it had a hole.",
        "The carrot had a hole.",
        ("I stuck a pin through a carrot. When I pulled the pin out, ", "The carrot", " had a hole."),
        {"a pin", "the pin"},
    ),
    (
        # Two pronouns match; more equal words next to the last one decide.
        "George got free tickets to the play, but he gave them to Eric, because he was particularly eager to see it.",
        "George was particularly eager to see it.",
        (
            "George got free tickets to the play, but he gave them to Eric, because ",
            "George",
            " was particularly eager to see it.",
        ),
        {"the play", "Eric"},
    ),
    (
        # A possessive pronoun: the candidate and its competitors are possessive.
        "Lily spoke to Donna, breaking her concentration.",
        "breaking Donna's concentration.",
        ("Lily spoke to Donna, breaking ", "Donna's", " concentration."),
        {"Lily's"},
    ),
    (
        "The police arrested the gang members because they were selling drugs.",
        "The gang members were selling drugs.",
        ("The police arrested the gang members because ", "The gang members", " were selling drugs."),
        {"The police"},
    ),
    (
        "Sam fell, and he's walking with crutches.",
        "Sam is walking with crutches.",
        ("Sam fell, and ", "Sam", "'s walking with crutches."),
        set(),
    ),
]


@pytest.mark.parametrize(("premise", "hypothesis", "expected", "others"), CASES)
def test_the_pronoun_is_where_the_hypothesis_differs(premise, hypothesis, expected, others):
    blank = find_blank(premise, hypothesis)
    assert blank is not None
    assert (blank.before, blank.candidate, blank.after) == expected
    assert others <= set(blank.others)


@pytest.mark.parametrize(
    ("premise", "hypothesis"),
    [("", "x"), ("it", "it"), ("Babies cry.", "Babies sleep."), ("It rained.", ""), ("He left.", "Something else.")],
)
def test_nothing_to_rank(premise, hypothesis):
    assert find_blank(premise, hypothesis) is None


def test_of_any_text_the_parts_make_up_the_premise_again():
    rng = random.Random(0)
    words = [
        *sorted(PRONOUNS),
        *sorted(DETERMINERS),
        "Bob's",
        "dogs'",
        "Ann",
        "dog",
        "saw",
        "big",
        ",",
        ".",
        "’",
        "é",
        "-",
    ]
    found = 0
    for _ in range(500):
        premise, hypothesis = (" ".join(rng.choices(words, k=rng.randint(0, 14))) for _ in range(2))
        blank = find_blank(premise, hypothesis)
        if blank is None:
            continue
        found += 1
        pronoun = premise[len(blank.before) : len(premise) - len(blank.after)]
        assert pronoun.lower() in PRONOUNS
        assert blank.before + pronoun + blank.after == premise
        assert blank.candidate in hypothesis
        assert blank.candidate
        lowered = [other.lower() for other in blank.others]
        assert len(set(lowered)) == len(lowered)
        assert blank.candidate.lower() not in lowered
    assert found > 100
