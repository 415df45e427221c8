"""Read parquet files and data sets of the Hugging Face hub in batches of rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq

from electra_composer.corpus.files import reason_of
from electra_composer.errors import UserError
from electra_composer.tasks.rows import Row
from electra_composer.tasks.texts import explain_reading

BATCH = 1000  # rows held at a time
_BUFFER = 1 << 20  # bytes read at a time of each column; without it a complete row group is read at once


def read_parquet(path: str) -> Iterator[Row]:
    """Yield the rows of a parquet file. Class numbers are replaced by their names, where the hub wrote these.

    Raises:
        UserError: the file cannot be read, or has two columns of one name.
    """
    with explain_reading(path), pq.ParquetFile(path, buffer_size=_BUFFER) as file:
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            double = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path}: more than one column {double!r}; expected different names: rename one")
        metadata = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", "{}"))
        features = metadata.get("info", {}).get("features", {})
        yield from _rows(file.iter_batches(BATCH, use_threads=False), features, path)


def open_hub(key: str, name: str, config: str | None, split: str) -> Any:
    """Open a split of a data set of the hub or its local cache (`datasets.Dataset`).

    Raises:
        UserError: it cannot be read.
    """
    import datasets  # takes a second, which reading files does not need

    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub's client raises a dozen kinds of errors
        shown = f"{name} ({config}, {split})" if config else f"{name} ({split})"
        raise UserError(
            f"{key}: the data set {shown} cannot be read from the hub: {reason_of(error)}; check the names and the "
            "connection, or give files"
        ) from error


def read_hub(dataset: Any, where: str) -> Iterator[Row]:
    """Yield the rows of a :class:`datasets.Dataset`. Class numbers are replaced by their names."""
    yield from _rows(dataset.with_format("arrow").iter(BATCH), dataset.features.to_dict(), where)


def _rows(batches: Iterator[Any], features: dict[str, Any], where: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        try:
            columns = [column.to_pylist() for column in batch.columns]
        except ValueError as error:  # text that is not UTF-8, a time that Python cannot represent
            end = number + batch.num_rows
            raise UserError(
                f"{where}, rows {number + 1} to {end}: {reason_of(error)}; correct the values or leave the column out"
            ) from error
        names = batch.schema.names
        for position, name in enumerate(names):
            columns[position] = _class_names(columns[position], features.get(name))
        for values in zip(*columns, strict=True):
            number += 1
            yield Row(dict(zip(names, values, strict=True)), f"{where}, row {number}")


def _class_names(column: list[Any], feature: Any) -> list[Any]:
    """Replace class numbers by names, also in lists; -1, which stands for no label, by None."""
    if not isinstance(feature, dict):
        return column
    if feature.get("_type") == "ClassLabel" and feature.get("names"):
        names = feature["names"]
        return [names[number] if number is not None and 0 <= number < len(names) else None for number in column]
    inner = feature.get("feature")
    if feature.get("_type") in ("Sequence", "List", "LargeList") and inner and inner.get("_type") == "ClassLabel":
        return [None if numbers is None else _class_names(numbers, inner) for numbers in column]
    return column
