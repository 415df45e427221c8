"""Read Arrow files, as `save_to_disk` of the library datasets writes them (streams), and as Feather is (files)."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from electra_composer.corpus.columns import column_of, column_path
from electra_composer.errors import UserError

_FILE_MAGIC = b"ARROW1"  # at the start of the file format; the stream format has none


def arrow_batches(path: str) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of a file, memory-mapped: columns that are not used are not read.

    Raises:
        OSError, pyarrow.ArrowException: it cannot be read.
    """
    with pa.memory_map(path) as file:
        is_file = file.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        file.seek(0)
        if is_file:
            with pa.ipc.open_file(file) as reader:
                for index in range(reader.num_record_batches):
                    yield reader.get_batch(index)
        else:
            with pa.ipc.open_stream(file) as stream:
                yield from stream


def arrow_rows(path: str) -> int:
    """Return the number of rows; only the headers of the batches are read."""
    return sum(batch.num_rows for batch in arrow_batches(path))


def arrow_sizes(path: str, column: str) -> list[int]:
    """Return the bytes of a column in each record batch; nothing if the file cannot be read or has no such column."""
    try:
        return [column_of(batch, column_path(batch.schema, column, path)).nbytes for batch in arrow_batches(path)]
    except (OSError, pa.ArrowException, UserError):  # reported when the file is read
        return []
