"""Read checkpoints of TensorFlow without TensorFlow: the files `NAME.index` and `NAME.data-00000-of-00001`.

The index is a table of LevelDB (its `doc/table_format.md`) from variable names to entries of TensorFlow's
`protobuf/tensor_bundle.proto`, which say where in the data files the values are. TensorFlow writes it uncompressed.
Nothing in these files is code.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from electra_composer.errors import UserError

MAGIC = 0xDB4775248B80FB57  # the last eight bytes of a LevelDB table, little-endian
_FOOTER_BYTES = 48
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}  # of `types.proto`; others are not weights


def find_checkpoint(path: str) -> str | None:
    """Return the prefix of a TensorFlow checkpoint: None if the path is none.

    Args:
        path: the prefix, one of its files, or a folder: the one that its file `checkpoint` names, else the first there.
    """
    if os.path.isdir(path):
        try:
            with open(os.path.join(path, "checkpoint"), encoding="utf-8") as file:
                named = re.search(r'^model_checkpoint_path: "(.*)"', file.read(), re.MULTILINE)
        except (OSError, UnicodeDecodeError):
            named = None
        prefixes = [os.path.join(path, os.path.basename(named[1]))] if named else []
        prefixes += [
            index.removesuffix(".index") for index in sorted(glob.glob(os.path.join(glob.escape(path), "*.index")))
        ]
        return next((prefix for prefix in prefixes if os.path.isfile(f"{prefix}.index")), None)
    prefix = re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", path)
    return prefix if os.path.isfile(f"{prefix}.index") else None


def read_variables(prefix: str) -> dict[str, NDArray[np.generic]]:
    """Read the variables of a TensorFlow checkpoint by their names; those that are not numbers are left out.

    Raises:
        UserError: a file is missing, cut short, or not of this format.
    """
    try:
        with open(f"{prefix}.index", "rb") as file:
            index = file.read()
        entries = dict(_table(index))
        shards = _message(entries.pop(b"")).number(1)
        files = [np.memmap(f"{prefix}.data-{shard:05d}-of-{shards:05d}", np.uint8, "r") for shard in range(shards)]
        return {
            name.decode(): values for name, entry in entries.items() if (values := _values(entry, files)) is not None
        }
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file, but it is a part of the checkpoint {prefix}") from error
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UserError(
            f"{prefix}.index: not a readable checkpoint of TensorFlow, or one that is incomplete ({error}); copy its "
            "files again"
        ) from error


def _values(entry: bytes, files: Sequence[NDArray[np.uint8]]) -> NDArray[np.generic] | None:
    """Return the values that a `BundleEntryProto` describes; None if they are no numbers."""
    fields = _message(entry)  # 1: dtype, 2: shape, 3: data file, 4: first byte, 5: bytes, 7: slices
    dtype = _DTYPES.get(fields.number(1))
    if dtype is None:
        return None
    if 7 in fields.parts:
        raise ValueError("a variable is divided into slices")
    shape = [_message(size).number(1) for size in _message(fields.part(2)).parts.get(2, [])]
    file, first, size = files[fields.number(3)], fields.number(4), fields.number(5)
    if first + size > len(file):
        raise ValueError(f"the data file has {len(file):,} bytes, fewer than the index says")
    return np.array(file[first : first + size]).view(dtype).reshape(shape)


def _table(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys and values of a LevelDB table."""
    footer = content[-_FOOTER_BYTES:]
    if len(footer) < _FOOTER_BYTES or int.from_bytes(footer[-8:], "little") != MAGIC:
        raise ValueError("it does not end as a table does")
    place = 0
    for _ in range(2):  # the meta index, which is empty, and the index
        first, place = _varint(footer, place)
        size, place = _varint(footer, place)
    for _, handle in _block(content, first, size):
        first, place = _varint(handle, 0)
        size, _ = _varint(handle, place)
        yield from _block(content, first, size)


def _block(content: bytes, first: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the entries of a block. A key is stored as the number of bytes shared with the one before, and the rest."""
    if first + size >= len(content) or content[first + size] != 0:
        raise ValueError("a block is compressed or missing")
    block = content[first : first + size]
    end = len(block) - 4 - 4 * int.from_bytes(block[-4:], "little")  # before the list of restarts
    if end < 0:
        raise ValueError("a block has no end")
    place, key = 0, b""
    while place < end:
        shared, place = _varint(block, place)
        rest, place = _varint(block, place)
        length, place = _varint(block, place)
        key = key[:shared] + block[place : place + rest]
        place += rest
        yield key, block[place : place + length]
        place += length


@dataclass
class _Message:
    """Fields of a protocol buffer by their numbers."""

    numbers: dict[int, list[int]]
    parts: dict[int, list[bytes]]

    def number(self, field: int) -> int:
        return self.numbers.get(field, [0])[0]

    def part(self, field: int) -> bytes:
        return self.parts.get(field, [b""])[0]


def _message(content: bytes) -> _Message:
    """Decode a protocol buffer; fields of fixed size are left out."""
    message = _Message({}, {})
    place = 0
    while place < len(content):
        tag, place = _varint(content, place)
        field, kind = tag >> 3, tag & 7
        if kind == 0:
            value, place = _varint(content, place)
            message.numbers.setdefault(field, []).append(value)
        elif kind == 2:
            size, place = _varint(content, place)
            message.parts.setdefault(field, []).append(content[place : place + size])
            place += size
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
        else:
            raise ValueError("an entry is not a protocol buffer")
    return message


def _varint(content: bytes, place: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, the lowest first, and where it ends."""
    number = 0
    for shift in range(0, 64, 7):
        byte = content[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
    raise ValueError("a number has no end")
