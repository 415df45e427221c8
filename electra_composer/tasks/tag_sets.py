"""The tags of a tagging task, learned from its training examples."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

from electra_composer.errors import UserError
from electra_composer.tasks import spans
from electra_composer.tasks.base import Split
from electra_composer.tasks.rows import Row
from electra_composer.tasks.spans import OUTSIDE, PREFIXES
from electra_composer.tasks.tagged_rows import listed, tags_of

NO_SPANS = "none"


@dataclass
class TagSet:
    """The tags that a model predicts.

    They are those of the data, except that IOB1 is converted to IOB2 and back: in IOB1 the tag of a word depends on the
    span before it. (google-research/electra converts all schemes to BIOES; the pipelines of transformers read IOB
    only.)

    Attributes:
        scheme: that of the data: `iob1`, `iob2`, `bioes` or `none`.
        labels: names in the order of their numbers: `O`, then sorted. With spans, every label has all prefixes, also
            those without a training example.
        fallback: number of the tag of words without a token, such as those of control characters: `O`, else the most
            frequent tag.
    """

    scheme: str
    labels: list[str]
    fallback: int

    def __post_init__(self) -> None:
        self._numbers = {label: number for number, label in enumerate(self.labels)}

    def numbers(self, tags: list[str], row: Row) -> list[int]:
        """Return the numbers of the tags of a sentence.

        Raises:
            UserError: a tag is unknown.
        """
        converted = tags
        if self.scheme == "iob1" and all(spans.is_valid(tag, self.scheme) for tag in tags):
            converted = spans.iob1_to_iob2(tags)
        for position, tag in enumerate(converted):
            if tag not in self._numbers:
                raise UserError(
                    f"{row.where}: tag {tags[position]!r} of word {position + 1} is not in data.train; expected one of "
                    f"{listed(self.labels)}: correct it, or leave the sentence out"
                )
        return [self._numbers[tag] for tag in converted]

    def names(self, numbers: list[int]) -> list[str]:
        """Return the tags of a sentence in the scheme of the data."""
        names = [self.labels[number] for number in numbers]
        return spans.iob2_to_iob1(names) if self.scheme == "iob1" else names


def learn_tags(train: Split, scheme: str, notes: list[str]) -> TagSet:
    """Collect the tags of the training examples.

    Args:
        scheme: `task.scheme`.
        notes: receives what was guessed.

    Raises:
        UserError: less than two tags, or tags that do not belong to the scheme.
    """
    pairs: Counter[tuple[str, str]] = Counter()
    places: dict[str, str] = {}
    for row in train:
        tags = tags_of(row, train) or []
        pairs.update(itertools.pairwise([OUTSIDE, *tags]))
        places.update(dict.fromkeys(set(tags) - places.keys(), row.where))
    counts: Counter[str] = Counter()
    for (_, tag), count in pairs.items():
        counts[tag] += count
    if len(counts) < 2:
        found = f"{len(counts)} different tags" if not counts else f"one tag, {next(iter(counts))},"
        raise UserError(
            f"data.train: {found} in column {train.columns['tags']!r}; expected at least two: set data.columns.tags=…"
        )
    scheme = _choose_scheme(scheme, pairs, notes)
    if scheme == NO_SPANS:
        labels = sorted(counts, key=lambda tag: (tag != OUTSIDE, tag))
    else:
        for tag, where in places.items():
            if not spans.is_valid(tag, scheme):
                expected = ", ".join([OUTSIDE, *(f"{prefix}-…" for prefix in PREFIXES[scheme])])
                raise UserError(
                    f"{where}: {tag!r} is not a tag of task.scheme={scheme}; expected {expected}: correct it, or set "
                    "task.scheme (none: tags without spans)"
                )
        labels = spans.all_tags(counts, scheme)
    most = OUTSIDE if OUTSIDE in labels else counts.most_common(1)[0][0]
    return TagSet(scheme, labels, labels.index(most))


def _choose_scheme(given: str, pairs: Counter[tuple[str, str]], notes: list[str]) -> str:
    guessed = spans.guess_scheme(pairs)
    if given == "auto":
        notes.append(f"task.scheme: {guessed}, guessed from the tags of data.train")
        return guessed
    if given == "bioes" and guessed != given:
        raise UserError(
            "task.scheme=bioes: no tag of data.train begins with E- or S-; expected the ends of spans and spans of one "
            f"word: set task.scheme={guessed}"
        )
    if given != NO_SPANS and guessed != given:
        notes.append(f"task.scheme: {given}, but the tags of data.train look like {guessed}")
    return given
