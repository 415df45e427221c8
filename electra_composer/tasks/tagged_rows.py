"""Words and tags of the rows of a tagging task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from electra_composer.errors import UserError
from electra_composer.tasks.base import Split
from electra_composer.tasks.rows import Row

MAX_LISTED = 20  # tags in a message


def words_of(row: Row, split: Split) -> list[str] | str:
    """Return the words of a sentence, or its text.

    Raises:
        UserError: the column is neither a list nor text.
    """
    value = value_of(row, split, "tokens")
    if isinstance(value, list):
        return ["" if word is None else str(word) for word in value]
    if value is None or isinstance(value, str):
        return value or ""
    raise UserError(
        f"{row.where}: {split.columns['tokens']} is {value!r:.40}; expected a list of words: {_set('tokens')}"
    )


def tags_of(row: Row, split: Split) -> list[str] | None:
    """Return the tags of a sentence; None if it has none, or a word of it has none.

    Raises:
        UserError: the column is not a list.
    """
    value = value_of(row, split, "tags")
    if value is None or (isinstance(value, list) and None in value):
        return None
    if isinstance(value, list):
        return [str(tag) for tag in value]
    raise UserError(f"{row.where}: {split.columns['tags']} is {value!r:.40}; expected a list of tags: {_set('tags')}")


def check_lengths(words: list[str] | str, tags: list[str], row: Row) -> None:
    """Refuse a sentence without a tag for each word.

    Raises:
        UserError: with its place.
    """
    if isinstance(words, str):
        raise UserError(f"{row.where}: tags of the text {words!r:.40}; expected a list of words: {_set('tokens')}")
    if len(words) != len(tags):
        raise UserError(
            f"{row.where}: {len(words)} words, {len(tags)} tags; expected a tag for each word: correct them"
        )


def value_of(row: Row, split: Split, role: str) -> Any:
    """Return the value in the column of a role; None if there is no such column."""
    column = split.columns.get(role)
    return None if column is None else row.values[column]  # type: ignore[index]


def listed(tags: Sequence[str]) -> str:
    """List tags in a message."""
    return ", ".join(tags[:MAX_LISTED]) + (f", … ({len(tags)} in all)" if len(tags) > MAX_LISTED else "")


def _set(role: str) -> str:
    return f"set data.columns.{role}=…"
