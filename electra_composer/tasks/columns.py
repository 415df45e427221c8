"""Choose the columns of a table for the roles of a task: by the user's choice, or by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from electra_composer.errors import UserError, nearest
from electra_composer.tasks.tables import Table

Columns = dict[str, str | list[str] | None]


def find_columns(
    table: Table, key: str, wanted: Mapping[str, Sequence[str | None]], given: Mapping[str, Any]
) -> Columns:
    """Find the column of each role: the one that the user gives, or the one with an obvious name.

    Columns that the user gives to one role are not guessed for another; neither is a column guessed twice.

    Args:
        key: of the configuration that holds the choices, for messages: `data.columns`.
        wanted: role → names of obvious columns in order of preference, compared without case. A list that ends in None
            is that of an optional role.
        given: role → column or list of columns. None or absent: to be guessed; empty: none, for an optional role.

    Returns:
        role → column, or the list that was given; None for an optional role without a column. What was guessed are the
        roles that `given` leaves open.

    Raises:
        UserError: a column does not exist or is ambiguous, or a role has none.
    """
    if unknown := [role for role in given if role not in wanted]:
        raise UserError(f"{key}.{unknown[0]}: no such column of this task; {nearest(unknown[0], list(wanted))}")
    found: Columns = {}
    for role, names in wanted.items():
        choice = given.get(role)
        if choice is None:
            continue
        if choice in ("", []) and names and names[-1] is None:
            found[role] = None
        elif isinstance(choice, list | tuple):
            found[role] = [_check(table, f"{key}.{role}", column) for column in choice]
        else:
            found[role] = _check(table, f"{key}.{role}", choice)
    for role, names in wanted.items():
        if role not in found:
            found[role] = _guess(table, f"{key}.{role}", names, _taken(found))
    return {role: found[role] for role in wanted}


def _check(table: Table, key: str, column: Any) -> str:
    name = str(column)  # columns without a header are numbers in YAML
    if name not in table.columns:
        raise UserError(
            f"{key}={name}: {table.files[0]} has no such column; {nearest(name, list(table.columns))} "
            f"(columns: {_listed(table)})"
        )
    return name


def _taken(found: Columns) -> set[str]:
    values = [value if isinstance(value, list) else [value] for value in found.values() if value is not None]
    return {column for columns in values for column in columns}


def _guess(table: Table, key: str, names: Sequence[str | None], taken: set[str]) -> str | None:
    free = [column for column in table.columns if column not in taken]
    known = [name for name in names if name is not None]
    for name in known:
        same = [column for column in free if column.casefold() == name.casefold()]
        if len(same) > 1:
            raise UserError(
                f"{table.files[0]}: more than one column could be {key.rpartition('.')[2]}: {', '.join(same)}; choose "
                f"one, as in {key}={same[0]}"
            )
        if same:
            return same[0]
    if names and names[-1] is None:
        return None
    role = key.rpartition(".")[2]
    raise UserError(
        f"{table.files[0]}: which column is {role} cannot be told by the names ({_listed(table)}); expected "
        f"{' or '.join(known)}: set it, as in {key}={free[0] if free else '…'}"
        + (", or data.header=false if the file has no header" if table.format in ("csv", "tsv") else "")
    )


def _listed(table: Table) -> str:
    return ", ".join(table.columns)
