"""Find the pronoun and the candidates for its referent in the sentence pairs of WNLI.

The hypothesis of a WNLI example repeats a part of the premise with a pronoun replaced by a candidate; the label says
whether it follows. To rank instead of classify, every noun phrase of the premise replaces the pronoun, and the
discriminator decides which sentence looks most original. RoBERTa (arXiv 1907.11692, section 5.1) does so with a masked
language model; richarddwang/electra_pytorch (`_utils/wsc_trick.py`) uses a discriminator, with SuperGLUE's spans and a
parser. Here the pronoun and the candidate of the hypothesis are found by comparing hypothesis and premise, and the
competing candidates by determiners and capital letters. Without a parser some candidates are not noun phrases; the
discriminator finds them unlikely.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PRONOUNS = _words("he she it they him her them his hers its their theirs himself herself itself themselves")
DETERMINERS = _words("a an the this that these those my your his her its our their some any each every another no")
# Words that end or cannot start a noun phrase, in addition to pronouns and determiners.
FUNCTION_WORDS = _words(
    """
    about above across after against along although am among and are around as at away back be because been before
    behind being below beside besides between both but by can cannot could did do does doing done down during either
    even ever except for from had has have having here how however i if in inside into is just like may me might more
    most much must near neither never nor not now of off on once one only onto or otherwise out outside over own past
    rather shall she should since so soon still such than then there therefore though through till to together too
    toward towards under unless until up upon us very was we were what whatever when whenever where whether which while
    who whoever whom whose why will with within without would yet you
    """
)
MAX_CANDIDATE_WORDS = 3  # after the determiner; candidates of 1, 2 and 3 words all compete
# "he's" is two words, since the hypothesis may have "Bob is"; possessives ("Bob's", "dogs'") are one word.
CONTRACTIONS = {"s": "is", "re": "are", "ll": "will", "d": "would", "ve": "have"}
WORD = re.compile(r"\b(?:he|she|it|they)(?=['’]\w)|\w+(?:['’-]\w+)*['’]?", re.IGNORECASE)


@dataclass(frozen=True)
class Blank:
    """A premise with a blank in place of the pronoun.

    Attributes:
        before, after: text around the pronoun.
        candidate: replacement of the pronoun in the hypothesis.
        others: competing candidates: other noun phrases of the premise, without duplicates; may be empty.
    """

    before: str
    after: str
    candidate: str
    others: tuple[str, ...]


class _Words:
    def __init__(self, text: str):
        self.text = text
        self.spans = [match.span() for match in WORD.finditer(text)]

    def lower(self, index: int) -> str:
        start, end = self.spans[index]
        word = self.text[start:end].lower()
        return CONTRACTIONS.get(word, word)

    def __len__(self) -> int:
        return len(self.spans)


def find_blank(premise: str, hypothesis: str) -> Blank | None:
    """Find the pronoun of `premise` that `hypothesis` replaces, and its candidates.

    The hypothesis is a part of the premise around the pronoun, with the candidate in its place. All pairs of a pronoun
    and a span of the hypothesis are compared. The best pair has the largest number of words next to the span that equal
    those next to the pronoun, minus the other words outside the span. Ties go to the shortest span, then the last
    pronoun.

    Returns:
        None if no word next to any pronoun is in the hypothesis: there is nothing to rank.
    """
    before, after = _Words(premise), _Words(hypothesis)
    best: tuple[tuple[int, int, int], int, int, int] | None = None
    for pronoun in range(len(before)):
        if before.lower(pronoun) not in PRONOUNS:
            continue
        left = [_matches(before, pronoun - 1, after, start - 1, -1) for start in range(len(after) + 1)]
        right = [_matches(before, pronoun + 1, after, end, 1) for end in range(len(after) + 1)]
        for start in range(len(after)):
            for end in range(start + 1, len(after) + 1):
                matched = left[start] + right[end]
                unexplained = len(after) - (end - start) - matched
                if matched == 0 or (after.lower(start) in PRONOUNS and end == start + 1):
                    continue
                score = (matched - unexplained, start - end, pronoun)
                if best is None or score > best[0]:
                    best = score, pronoun, start, end
    if best is None:
        return None
    _, pronoun, start, end = best
    candidate = hypothesis[after.spans[start][0] : after.spans[end - 1][1]]
    begin, stop = before.spans[pronoun]
    return Blank(premise[:begin], premise[stop:], candidate, _other_candidates(before, pronoun, candidate))


def _matches(left: _Words, i: int, right: _Words, j: int, step: int) -> int:
    """Count equal consecutive words, starting at `i` and `j` in the direction of `step`."""
    count = 0
    while 0 <= i < len(left) and 0 <= j < len(right) and left.lower(i) == right.lower(j):
        count, i, j = count + 1, i + step, j + step
    return count


def _other_candidates(premise: _Words, pronoun: int, candidate: str) -> tuple[str, ...]:
    """Find noun phrases of the premise that share no content word with `candidate` and do not contain the pronoun.

    They are possessive if `candidate` is.
    """
    taken = {_stem(word) for word in WORD.findall(candidate.lower())} - DETERMINERS - FUNCTION_WORDS
    possessive = candidate.endswith(("'s", "’s", "s'", "s’"))
    found: dict[str, str] = {}
    for start, end in _noun_phrases(premise):
        words = [premise.lower(index) for index in range(start, end)]
        if start <= pronoun < end or not taken.isdisjoint(map(_stem, words)):
            continue
        text = premise.text[premise.spans[start][0] : premise.spans[end - 1][1]]
        text = re.sub(r"['’]s?$", "", text)
        if possessive:
            text += "'" if text.endswith("s") else "'s"
        found.setdefault(text.lower(), text)
    return tuple(found.values())


def _noun_phrases(words: _Words) -> list[tuple[int, int]]:
    """Return spans of words that may be noun phrases: a determiner with the words after it, or capitalized words."""
    spans = []
    for start in range(len(words)):
        first = words.lower(start)
        if first in DETERMINERS:
            for end in range(start + 2, start + 2 + MAX_CANDIDATE_WORDS):
                if end > len(words) or not _adjacent(words, end - 1) or _is_function(words.lower(end - 1)):
                    break
                spans.append((start, end))
        elif _is_name(words, start) and not (start > 0 and _is_name(words, start - 1) and _adjacent(words, start)):
            end = start + 1
            while end < len(words) and _is_name(words, end) and _adjacent(words, end):
                end += 1
            spans.append((start, end))
    return spans


def _adjacent(words: _Words, index: int) -> bool:
    """Whether only space separates a word from the word before it."""
    return words.text[words.spans[index - 1][1] : words.spans[index][0]].isspace()


def _is_name(words: _Words, index: int) -> bool:
    start = words.spans[index][0]
    return words.text[start].isupper() and not _is_function(words.lower(index))


def _is_function(word: str) -> bool:
    return word in FUNCTION_WORDS or word in DETERMINERS or word in PRONOUNS


def _stem(word: str) -> str:
    """Strip the endings of possessive and plural."""
    return re.sub(r"(?:['’]s?|(?<=\w{3})s)$", "", word)
