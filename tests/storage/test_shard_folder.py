"""Metadata of a folder of shards."""

from __future__ import annotations

from small_shards import LENGTH, make_tokenizer, write_shards

from electra_composer.batches.shards import read_meta
from electra_composer.storage.shard_folder import Meta, id_dtype


def test_meta_comes_back(tmp_path):
    shards = write_shards(tmp_path / "out", make_tokenizer(tmp_path))
    meta = read_meta(shards)
    assert (meta.max_seq_length, meta.packing, meta.splits["train"].rows) == (LENGTH, "packed", 40)
    assert meta.tokenizer.special_ids == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert meta.splits["val"].fill(LENGTH) == meta.splits["val"].tokens / (7 * LENGTH)
    assert Meta.from_json(meta.to_json(), shards) == meta


def test_id_dtype():
    assert [id_dtype(n) for n in (30522, 65536, 65537)] == ["uint16", "uint16", "uint32"]
