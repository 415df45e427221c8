"""Rows read one batch at a time, compared with Streaming's decoding; damaged shards are refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from streaming import LocalDataset, MDSWriter

from electra_composer.batches import row_reader
from electra_composer.batches.row_reader import RowReader
from electra_composer.errors import UserError


def write(folder, rows=200, dtype="uint16", size_limit=2000, columns=None, seed=0):
    rng = np.random.default_rng(seed)
    columns = columns or {"input_ids": f"ndarray:{dtype}", "segment_lengths": "ndarray:uint16"}
    with MDSWriter(columns=columns, out=str(folder), size_limit=size_limit) as writer:
        for _ in range(rows):
            length = int(rng.choice([1, 5, 100, 255, 256, 700]))  # lengths stored in one and in two bytes
            writer.write(
                {
                    "input_ids": rng.integers(0, np.iinfo(dtype).max, length).astype(dtype),
                    "segment_lengths": rng.integers(1, 9, 2 * int(rng.choice([1, 2, 200]))).astype(np.uint16),
                }
            )
    return LocalDataset(local=str(folder))


def reader_of(dataset):
    def missing(shard):
        raise FileNotFoundError(shard)

    return RowReader(dataset.shards, missing)


def rows_of(rows):
    ids = np.split(rows.input_ids, np.cumsum(rows.row_lengths)[:-1])
    segments = np.split(rows.segment_lengths, np.cumsum(2 * rows.examples_per_row)[:-1])
    return list(zip(ids, segments, strict=True))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_rows_are_those_that_streaming_decodes(tmp_path, dtype):
    dataset = write(tmp_path / "shards", dtype=dtype)
    assert len(dataset.shards) > 20
    numbers = np.random.default_rng(1).permutation(200)
    for (ids, segments), number in zip(rows_of(reader_of(dataset).read(numbers)), numbers, strict=True):
        expected = dataset[int(number)]
        assert ids.dtype == dtype
        assert ids.tolist() == expected["input_ids"].tolist()
        assert segments.tolist() == expected["segment_lengths"].tolist()


def test_few_shards_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(row_reader, "OPEN_SHARDS", 3)
    dataset = write(tmp_path / "shards")
    reader = reader_of(dataset)
    for number in [*range(0, 200, 7), *range(199, 0, -5)]:
        ((ids, _),) = rows_of(reader.read(np.array([number])))
        assert ids.tolist() == dataset[number]["input_ids"].tolist()
        assert len(reader._open) <= 3


def test_a_missing_shard_is_asked_for(tmp_path):
    dataset = write(tmp_path / "shards")
    name = tmp_path / "shards/shard.00001.mds"
    shutil.move(name, tmp_path / "elsewhere")
    asked = []

    def fetch(shard):
        asked.append(shard)
        shutil.move(tmp_path / "elsewhere", name)

    first = dataset.shards[0].samples
    RowReader(dataset.shards, fetch).read(np.array([first, 0, first]))
    assert asked == [1]


def damage(folder, change):
    path = folder / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def begin_of_first(data):
    return int.from_bytes(data[4:8], "little")


def set_bytes(data, at, value):
    data[at : at + 4] = value.to_bytes(4, "little")


DAMAGES = {
    "another number of samples": lambda data: set_bytes(data, 0, 7),
    "a sample beyond the end": lambda data: set_bytes(data, 8, 1 << 31),
    "samples that go backwards": lambda data: set_bytes(data, 8, 0),
    "a column larger than its sample": lambda data: set_bytes(data, begin_of_first(data), 1 << 20),
    "a column larger than anything": lambda data: set_bytes(data, begin_of_first(data), (1 << 32) - 1),
    "an empty column": lambda data: set_bytes(data, begin_of_first(data) + 4, 0),
    "no array of one dimension": lambda data: data.__setitem__(begin_of_first(data) + 8, 0),
    "a shape of eight bytes": lambda data: data.__setitem__(begin_of_first(data) + 8, 4 | 3),
    "cut short": lambda data: data.__delitem__(slice(100, None)),
    "empty": lambda data: data.clear(),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_shard_is_named(tmp_path, name):
    dataset = write(tmp_path / "shards", seed=3)
    damage(tmp_path / "shards", DAMAGES[name])
    with pytest.raises(UserError, match=r"shard\.00000\.mds: the shard is corrupt"):
        reader_of(dataset).read(np.arange(dataset.shards[0].samples))


def test_any_byte_changed_is_read_or_refused_but_never_a_crash(tmp_path):
    dataset = write(tmp_path / "shards", rows=12, size_limit=1 << 20)
    path = tmp_path / "shards/shard.00000.mds"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [*range(4 * 14), *rng.integers(0, len(whole), 300).tolist()]
    refused = 0
    for place in places:
        data = bytearray(whole)
        data[place] ^= 0xFF
        path.write_bytes(data)
        try:
            reader_of(dataset).read(np.arange(12))
        except UserError:
            refused += 1
    assert refused > 50


def test_other_columns_are_refused(tmp_path):
    dataset = write(
        tmp_path / "shards", columns={"segment_lengths": "ndarray:uint16", "input_ids": "ndarray:int64"}, dtype="int64"
    )
    with pytest.raises(UserError, match="columns"):
        reader_of(dataset)
