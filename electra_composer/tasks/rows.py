"""Rows of a user's data, and a count of the rows that are left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from electra_composer.errors import UserError

MAX_LEFT_OUT = 0.5  # maximum fraction of rows left out: beyond it a wrong column is more likely than bad rows
_SINGULAR = {"have ": "has ", "are ": "is ", "were ": "was ", "contain ": "contains "}


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        values: column → text, number, list …, as in the file.
        where: its place, for messages: `reviews.csv:17` (the line where it begins), `train.parquet, row 17` (the first
            is row 1), or `dev-v2.0.json, question '56be4d'`.
    """

    values: dict[str, Any]
    where: str


class LeftOut:
    """The number of rows of a split that are left out, by reason, with the place of the first of each.

        left_out = LeftOut(table.split)
        for row in left_out.count(table):
            if not row.values[text].strip():
                left_out.add("have an empty text", row.where)
                …
        left_out.check()

    Attributes:
        split: name in messages, such as `train`.
        total: rows counted, those left out included.
        reasons: reason → number of rows, and place of the first.
    """

    def __init__(self, split: str) -> None:
        self.split = split
        self.total = 0
        self.reasons: dict[str, tuple[int, str]] = {}

    def count(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows and count them."""
        for row in rows:
            self.total += 1
            yield row

    def add(self, reason: str, where: str) -> None:
        """Count a row that is left out, once.

        Args:
            reason: predicate of several rows, such as `have an empty text`.
            where: :attr:`Row.where`.
        """
        number, first = self.reasons.get(reason, (0, where))
        self.reasons[reason] = (number + 1, first)

    def __len__(self) -> int:
        return sum(number for number, _ in self.reasons.values())

    def describe(self) -> str | None:
        """Return a line such as `train: 3 of 1,203 rows left out: 2 have an empty text (first: a.csv:17), 1 …`.

        Returns:
            None if no row is left out. The total is not named if :meth:`count` was not used.
        """
        if not self.reasons:
            return None
        of = f" of {self.total:,}" if self.total else ""
        rows = "row" if (self.total or len(self)) == 1 else "rows"
        most_first = sorted(self.reasons.items(), key=lambda item: -item[1][0])
        parts = (f"{number:,} {_agree(reason, number)} (first: {first})" for reason, (number, first) in most_first)
        return f"{self.split}: {len(self):,}{of} {rows} left out: {', '.join(parts)}"

    def check(self) -> None:
        """Refuse a split of which nothing or less than half is left.

        Raises:
            UserError: there are no rows, or more than :data:`MAX_LEFT_OUT` of them are left out.
        """
        if not self.total:
            raise UserError(f"{self.split}: no rows; expected at least one; check data.{self.split}")
        if len(self) == self.total or len(self) > MAX_LEFT_OUT * self.total:
            raise UserError(f"{self.describe()}; expected at most half of them: check the columns (data.columns)")


def _agree(reason: str, number: int) -> str:
    """Put the verb of a predicate into the singular for one row."""
    for plural, singular in _SINGULAR.items():
        if number == 1 and reason.startswith(plural):
            return singular + reason.removeprefix(plural)
    return reason
