"""Fixtures: shards in many files, shards on a local S3 server, and folders to be mixed as streams."""

from __future__ import annotations

import shutil

import pytest
from batch_loaders import upload
from small_shards import make_tokenizer
from small_streams import ROWS, write_stream
from streaming import LocalDataset, MDSWriter


@pytest.fixture(scope="module")
def many_shards(shards, tmp_path_factory):
    """The rows of `shards` in more than ten files per split."""
    folder = tmp_path_factory.mktemp("many") / "shards"
    shutil.copytree(shards, folder)
    for split in ("train", "val"):
        rows = list(LocalDataset(local=str(shards), split=split))
        shutil.rmtree(folder / split)
        columns = {"input_ids": "ndarray:uint16", "segment_lengths": "ndarray:uint16"}
        with MDSWriter(columns=columns, out=str(folder / split), size_limit=1500, hashes=["xxh64"]) as writer:
            for row in rows:
                writer.write(row)
    assert len(list((folder / "train").glob("*.mds"))) > 10
    return folder


@pytest.fixture
def remote(s3, many_shards):
    return upload(s3, many_shards)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    tokenizer = make_tokenizer(folder)
    for stream in ROWS:
        write_stream(folder / stream, tokenizer, stream)
    return folder
