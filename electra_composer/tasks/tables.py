"""A split of the user's data as a table: rows of named columns, read as a stream from files or from the hub."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from electra_composer.errors import UserError
from electra_composer.tasks.arrow import open_hub, read_hub, read_parquet
from electra_composer.tasks.conll import read_conll
from electra_composer.tasks.delimited import read_csv, read_tsv
from electra_composer.tasks.files import find_table_files
from electra_composer.tasks.formats import AUTO
from electra_composer.tasks.json_rows import read_json, read_jsonl
from electra_composer.tasks.question_answers import read_mrqa, read_squad
from electra_composer.tasks.rows import Row

HUB = "hub"
READERS: dict[str, Callable[..., Iterator[Row]]] = {
    "csv": read_csv,
    "tsv": read_tsv,
    "jsonl": read_jsonl,
    "json": read_json,
    "parquet": read_parquet,
    "conll": read_conll,
    "squad": read_squad,
    "mrqa": read_mrqa,
}
_FIRST = 100  # rows of a file whose columns are taken for those of the table; objects may leave out keys


@dataclass(frozen=True)
class Table:
    """A split of the user's data. Each iteration opens the files again and reads them as a stream.

    Every row has a value for every column. Objects of JSON may leave out keys, which are None then, and have others
    than :attr:`columns`, which are kept.

    Attributes:
        split: name in messages, such as `train`.
        columns: names of the columns, in the order of the file.
        format: one of :data:`READERS`, or `hub`.
        files: paths; of a data set of the hub, its name.
    """

    split: str
    columns: tuple[str, ...]
    format: str
    files: tuple[str, ...]
    _readers: tuple[Callable[..., Iterator[Row]], ...] = field(repr=False)  # of the files

    def __iter__(self) -> Iterator[Row]:
        """Yield all rows, file by file.

        Raises:
            UserError: a file is malformed, or its rows lack a column.
        """
        wanted = set(self.columns)
        fills = self.format in ("json", "jsonl")
        document = 0
        for file, reader in zip(self.files, self._readers, strict=True):
            rows = reader(first_document=document) if self.format == "conll" else reader()
            row = None
            for row in rows:
                if row.values.keys() != wanted:
                    if not fills:
                        raise _other_columns(file, tuple(row.values), self.columns, self.files[0])
                    for column in self.columns:
                        row.values.setdefault(column, None)
                yield row
            if row is None:
                raise _no_rows(file)
            if self.format == "conll":
                document = row.values["document"] + 1


def open_table(
    key: str,
    source: str,
    format: str = AUTO,
    header: bool = True,
    hub: str | None = None,
    hub_config: str | None = None,
) -> Table:
    """Find the files of a split, and read the first rows of each to know the columns.

    Args:
        key: of the configuration, for messages, such as `data.train`; the split is named after its last part.
        source: a file, a folder with files of one format, or a glob; with `hub`, the name of a split.
        format: `csv`, `tsv`, `jsonl`, `json`, `parquet`, `conll`, `squad`, `mrqa`, or `auto`: by name and content.
        header: the first line of csv and tsv has the names of the columns; otherwise they are `0`, `1`, ….
        hub: name of a data set of the Hugging Face hub.
        hub_config: configuration of that data set.

    Raises:
        UserError: no files, several formats or an unknown one, no rows, a malformed file, or files with different
            columns; an unreachable data set.
    """
    split = key.rpartition(".")[2]
    readers: list[Callable[..., Iterator[Row]]]
    if hub is not None:
        dataset: Any = open_hub(key, hub, hub_config, source)
        format, files = HUB, [hub]
        readers = [functools.partial(read_hub, dataset, f"{hub} {source}")]
    else:
        format, files = find_table_files(key, source, format)
        options = {"header": header} if format in ("csv", "tsv") else {}
        readers = [functools.partial(READERS[format], file, **options) for file in files]
    columns: tuple[str, ...] = ()
    for file, reader in zip(files, readers, strict=True):
        found = _columns(file, reader)
        if columns and format not in ("json", "jsonl") and set(found) != set(columns):
            raise _other_columns(file, found, columns, files[0])
        # the keys of objects are those of all files, in the order in which they appear
        columns = tuple(dict.fromkeys((*columns, *found)))
    return Table(split, columns, format, tuple(files), tuple(readers))


def _columns(file: str, reader: Callable[..., Iterator[Row]]) -> tuple[str, ...]:
    rows = list(itertools.islice(reader(), _FIRST))
    if not rows:
        raise _no_rows(file)
    return tuple(dict.fromkeys(name for row in rows for name in row.values))


def _no_rows(file: str) -> UserError:
    return UserError(f"{file}: no rows; expected at least one: the file is empty or has a header only, check it")


def _other_columns(file: str, found: tuple[str, ...], expected: tuple[str, ...], first_file: str) -> UserError:
    return UserError(
        f"{file}: columns {', '.join(found)}; expected those of {first_file}: {', '.join(expected)}; rename them, or "
        "give the files that belong together"
    )
