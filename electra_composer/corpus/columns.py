"""Find the text in a record: a column by its name, a nested one (`a.b`), or the only one that looks like text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from electra_composer.errors import UserError

if TYPE_CHECKING:  # where it is used, it is imported there: a command line that is wrong needs no files
    import pyarrow as pa

TEXT = "text"  # the column unless another is chosen
_SHOWN = 20  # names in a message
_TEXT_LENGTH = 20  # mean characters of a column that looks like text


def missing_column(where: str, column: str, columns: list[str]) -> UserError:
    more = f" and {len(columns) - _SHOWN:,} more" if len(columns) > _SHOWN else ""
    found = ", ".join(map(repr, columns[:_SHOWN])) + more if columns else "none"
    return UserError(f"{where}: no column {column!r}; found {found}: choose one with --text-column")


def nested_value(record: dict[str, Any], column: str, where: str) -> Any:
    """Return the value of a key, or by a name such as `a.b` that of the key `b` of the object `a`.

    Returns:
        None also where an object on the way is null.

    Raises:
        UserError: there is no such key.
    """
    if column in record:
        return record[column]
    value: Any = record
    for name in column.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or name not in value:
            raise missing_column(where, column, list(_leaves(record)))
        value = value[name]
    return value


def _leaves(record: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in record.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def column_path(schema: pa.Schema, column: str, where: str) -> list[str]:
    """Return the path to a column of an Arrow schema: its name, or by `a.b` those of a field in a column of structs.

    Raises:
        UserError: there is no such column.
    """
    import pyarrow as pa

    if column in schema.names:
        return [column]
    path, fields = column.split("."), {field.name: field.type for field in schema}
    for number, name in enumerate(path):
        if name not in fields:
            break
        if number == len(path) - 1:
            return path
        fields = {field.name: field.type for field in fields[name]} if pa.types.is_struct(fields[name]) else {}
    raise missing_column(where, column, [name for field in schema for name in _field_names(field)])


def _field_names(field: pa.Field, prefix: str = "") -> Iterator[str]:
    import pyarrow as pa

    if pa.types.is_struct(field.type) and field.type.num_fields:
        for inner in field.type:
            yield from _field_names(inner, f"{prefix}{field.name}.")
    else:
        yield prefix + field.name


def column_of(batch: pa.RecordBatch, path: list[str]) -> pa.Array:
    """Return the values of a column by its :func:`column_path`."""
    import pyarrow.compute as pc

    values = batch.column(path[0])
    return pc.struct_field(values, path[1:]) if path[1:] else values


def text_column(where: str, column: str, names: list[str], sample: list[list[str]]) -> int:
    """Return the index of the text column of a table of strings.

    If `column` is :data:`TEXT` and there is none of that name, it is the only column, or the only one that looks like
    text in the sample.

    Args:
        sample: the first records.

    Raises:
        UserError: no column of that name, and none or several that look like text.
    """
    if column in names:
        return names.index(column)
    likely = [index for index in range(len(names)) if _looks_like_text([record[index] for record in sample])]
    if column == TEXT and (len(names) == 1 or len(likely) == 1):
        return likely[0] if likely else 0
    raise missing_column(where, column, names)


def _looks_like_text(values: list[str]) -> bool:
    """Return whether values are sentences, rather than numbers, dates, names, addresses or hashes."""
    found = [value for value in values if value.strip()]
    joined = "".join(found)
    words = sum(bool(re.search(r"\S\s+\S", value)) or not value.isascii() for value in found)
    letters = sum(character.isalpha() for character in joined)
    return (
        bool(found)
        and len(joined) >= _TEXT_LENGTH * len(found)
        and 2 * words > len(found)
        and 2 * letters > len(joined)
    )
