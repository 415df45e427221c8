"""Spans of tagged words: the schemes IOB1, IOB2 and BIOES, and scores of spans."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

OUTSIDE = "O"
PREFIXES = {"iob1": "BI", "iob2": "BI", "bioes": "BIES"}
"""Scheme → prefixes of its tags. B: begin, I: inside, E: end, S: a span of one word."""
_TAG = re.compile(r"([BIES])(?:-(.+))?")
_CODES = "OBIES"
_O, _B, _I, _E, _S = range(5)


class Spans(NamedTuple):
    """Spans of all sentences of a split, in their order.

    Attributes:
        starts, ends: words, counted over all sentences, int64 `[spans]`; the end is exclusive.
        kinds: index of the label, int64 `[spans]`.
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    kinds: NDArray[np.int64]


class SpanTags:
    """The tags of a scheme, as arrays.

    Args:
        tags: names of the tags, in the order of their numbers: `O`, `B-PER`, …
        scheme: `iob2` or `bioes`.

    Attributes:
        kinds: labels of spans, such as `PER`, sorted.
    """

    def __init__(self, tags: Sequence[str], scheme: str):
        parsed = [parse(tag) for tag in tags]
        self.scheme = scheme
        self.kinds = sorted({kind for prefix, kind in parsed if prefix != OUTSIDE})
        self._prefixes = np.array([_CODES.index(prefix) for prefix, _ in parsed])
        self._kinds = np.array([-1 if prefix == OUTSIDE else self.kinds.index(kind) for prefix, kind in parsed])

    def find(self, tags: NDArray[np.integer], offsets: NDArray[np.int64], strict: bool) -> Spans:
        """Find the spans of tagged sentences.

        A span goes on at `I` or `E` after `B` or `I` of the same label; any other tag but `O` begins a new one. That is
        the rule of conlleval, of transformers' pipelines, and of google-research/electra, which accept for example an
        `I` after `O`. Strict spans are those of seqeval's strict mode: they begin with `B` and, in BIOES, end with `E`,
        or are a single `S`.

        Args:
            tags: numbers of the tags of all words, int `[words]`.
            offsets: int64 `[sentences + 1]`; sentence i has the words `offsets[i]:offsets[i + 1]`.
            strict: whether spans that do not follow the scheme are left out.
        """
        prefixes, kinds = self._prefixes[tags], self._kinds[tags]
        goes_on = np.zeros(len(tags), dtype=bool)
        goes_on[1:] = np.isin(prefixes[1:], (_I, _E)) & np.isin(prefixes[:-1], (_B, _I)) & (kinds[1:] == kinds[:-1])
        goes_on[offsets[:-1][np.diff(offsets) > 0]] = False  # at the first word of a sentence
        is_tagged = prefixes != _O
        starts = np.flatnonzero(is_tagged & ~goes_on)
        lasts = np.flatnonzero(is_tagged & ~np.append(goes_on[1:], False))
        if strict:
            first, last = prefixes[starts], prefixes[lasts]
            valid = (first == _S) | ((first == _B) & ((last == _E) if self.scheme == "bioes" else True))
            starts, lasts = starts[valid], lasts[valid]
        return Spans(starts, lasts + 1, kinds[starts])

    def by_sentence(self, tags: NDArray[np.integer], offsets: NDArray[np.int64]) -> list[list[tuple[int, int, str]]]:
        """Return start, end and label of the spans of each sentence, lenient, in words of the sentence."""
        found = self.find(tags, offsets, strict=False)
        sentence = np.searchsorted(offsets, found.starts, side="right") - 1
        begins = offsets[sentence]
        spans: list[list[tuple[int, int, str]]] = [[] for _ in offsets[1:]]
        columns = (sentence, found.starts - begins, found.ends - begins, found.kinds)
        for number, start, end, kind in zip(*(column.tolist() for column in columns), strict=True):
            spans[number].append((start, end, self.kinds[kind]))
        return spans

    def kind_numbers(self, tags: NDArray[np.integer]) -> NDArray[np.integer]:
        """Return the index in :attr:`kinds` of the label of each tag, -1 for `O`."""
        return self._kinds[tags]

    def counts(self, predicted: Spans, true: Spans) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the number of right, true and predicted spans of each label, int64 `[kinds]`.

        A span is right if start, end and label are.
        """
        size = 1 + max(int(spans.ends.max(initial=0)) for spans in (predicted, true))
        keys = [(spans.starts * size + spans.ends) * len(self.kinds) + spans.kinds for spans in (predicted, true)]
        right = predicted.kinds[np.isin(keys[0], keys[1])]
        right, wanted, given = (
            np.bincount(each, minlength=len(self.kinds)).astype(np.int64)
            for each in (right, true.kinds, predicted.kinds)
        )
        return right, wanted, given

    def scores(self, predicted: Spans, true: Spans) -> dict[str, float]:
        """Return `precision`, `recall`, `f1` over all spans, and `macro_f1`, the mean of the F1 of each label.

        A score whose denominator is zero is 0, as in seqeval and conlleval. The mean is over the labels that have
        predicted or true spans.
        """
        right, wanted, given = self.counts(predicted, true)
        occurs = given + wanted > 0
        return {
            "f1": _ratio(2 * right.sum(), given.sum() + wanted.sum()),
            "precision": _ratio(right.sum(), given.sum()),
            "recall": _ratio(right.sum(), wanted.sum()),
            "macro_f1": float((2 * right[occurs] / (given + wanted)[occurs]).mean()) if occurs.any() else 0.0,
        }


def _ratio(part: np.integer, whole: np.integer) -> float:
    return float(part / whole) if whole else 0.0


def parse(tag: str) -> tuple[str, str]:
    """Divide a tag into prefix and label: `B-PER` → `B`, `PER`; `B` → `B` and an empty label; `O` → `O` and the same.

    Raises:
        ValueError: the tag has neither form.
    """
    if tag == OUTSIDE:
        return OUTSIDE, ""
    match = _TAG.fullmatch(tag)
    if match is None:
        raise ValueError(tag)
    return match[1], match[2] or ""


def join(prefix: str, kind: str) -> str:
    """Reverse :func:`parse`."""
    return f"{prefix}-{kind}" if kind else prefix


def all_tags(tags: Iterable[str], scheme: str) -> list[str]:
    """Return `O`, and all tags of the scheme with the labels of the given tags, sorted."""
    kinds = {parse(tag)[1] for tag in tags if tag != OUTSIDE}
    return [OUTSIDE, *sorted(join(prefix, kind) for prefix in PREFIXES[scheme] for kind in kinds)]


def is_valid(tag: str, scheme: str) -> bool:
    """Tell whether a tag belongs to a scheme."""
    return tag == OUTSIDE or (_TAG.fullmatch(tag) is not None and tag[0] in PREFIXES[scheme])


def guess_scheme(pairs: Counter[tuple[str, str]]) -> str:
    """Guess how the spans of tagged sentences are marked.

    Tags without prefixes mark no spans. In IOB1 most spans begin with `I`, and `B` only separates neighbours.

    Args:
        pairs: (tag of the previous word, or `O` at the begin of a sentence; tag of a word) → frequency.

    Returns:
        `iob1`, `iob2`, `bioes` or `none`.
    """
    tags = {tag for pair in pairs for tag in pair}
    marked = {tag[0] for tag in tags if "-" in tag and _TAG.fullmatch(tag)}
    if not marked and tags <= set(_CODES):  # spans without labels
        marked = tags - {OUTSIDE}
    if not marked:
        return "none"
    if marked & {"E", "S"}:
        return "bioes"
    begins: Counter[str] = Counter()
    for (before, tag), count in pairs.items():
        if tag[0] in "BI" and before[1:] != tag[1:]:
            begins[tag[0]] += count
    return "iob1" if begins["I"] > begins["B"] else "iob2"


def iob1_to_iob2(tags: Iterable[str]) -> list[str]:
    """Mark the first word of every span of a sentence by `B`."""
    converted, before = [], (OUTSIDE, "")
    for tag in tags:
        prefix, kind = parse(tag)
        if prefix == "I" and (before[0] == OUTSIDE or before[1] != kind):
            prefix = "B"
        converted.append(join(prefix, kind))
        before = prefix, kind
    return converted


def iob2_to_iob1(tags: Iterable[str]) -> list[str]:
    """Mark only those first words of spans of a sentence by `B` that follow a span of the same label."""
    converted, before = [], (OUTSIDE, "")
    for tag in tags:
        prefix, kind = parse(tag)
        touches = before[0] != OUTSIDE and before[1] == kind
        converted.append(join("I" if prefix == "B" and not touches else prefix, kind))
        before = prefix, kind
    return converted
