"""Fixtures: shards in many files, shards on a local S3 server, and folders to be mixed as streams."""

from __future__ import annotations

import pytest
from batch_loaders import upload
from small_shards import copy_to_many_files, make_tokenizer
from small_streams import ROWS, write_stream


@pytest.fixture(scope="module")
def many_shards(shards, tmp_path_factory):
    """The rows of `shards` in more than ten files per split."""
    return copy_to_many_files(shards, tmp_path_factory.mktemp("many") / "shards")


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
