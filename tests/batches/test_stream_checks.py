"""Streams that do not fit together, or whose weights are invalid, are refused."""

from __future__ import annotations

import pytest
from small_shards import WORDS, make_tokenizer
from small_streams import config, loader_of, write_stream

from electra_composer.batches.shards import build_data_spec, read_data
from electra_composer.errors import UserError


def test_streams_of_other_tokenizers_or_lengths(folders, tmp_path):
    write_stream(tmp_path / "b", make_tokenizer(tmp_path, [*WORDS, "more"]), "b")
    write_stream(tmp_path / "c", make_tokenizer(folders), "c", length=32)
    options = config(folders, {"a": {}, "b": {}})
    options.streams["b"].path = str(tmp_path / "b")
    with pytest.raises(
        UserError,
        match=r"data\.streams\.a has the tokenizer words \(205 entries.*"
        r"data\.streams\.b has the tokenizer words \(206 entries",
    ):
        read_data(options)
    options = config(folders, {"a": {}, "c": {}})
    options.streams["c"].path = str(tmp_path / "c")
    message = r"data\.streams\.a has rows of 16 tokens, data\.streams\.c has rows of 32 tokens"
    with pytest.raises(UserError, match=message):
        read_data(options)


def test_streams_of_other_id_types(folders, tmp_path):
    write_stream(tmp_path / "b", make_tokenizer(tmp_path), "b", dtype="uint32")
    options = config(folders, {"a": {}, "b": {}})
    options.streams["b"].path = str(tmp_path / "b")
    with pytest.raises(UserError, match=r"b/train/shard\.00000\.mds: its columns are .*uint32.*uint16"):
        next(iter(loader_of(options)))


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ({"a": {"proportion": 1}, "b": {}}, {}, r"streams\.a has a proportion, but data\.streams\.b has none"),
        ({"a": {"repeat": 2}, "b": {"proportion": 1}}, {}, r"streams\.b has a proportion, but .*streams\.a has repeat"),
        ({"a": {"repeat": 2, "choose": 3}}, {}, r"data\.streams\.a has repeat and choose; give one of them"),
        ({"a": {"choose": 3}, "b": {}}, {"epoch_size": 100}, r"data\.epoch_size cannot be combined with repeat"),
        ({"apple": {}}, {"eval_streams": ["aple"]}, r"no stream aple; did you mean apple\?"),
        ({"a": {}}, {"eval_streams": []}, r"data\.eval_streams is \[\]; expected names"),
        ({}, {"eval_streams": ["a"]}, r"data\.eval_streams is \['a'\], but there are no data\.streams"),
        ({}, {"batching_method": "stratified"}, r"data\.batching_method is stratified, but there are no"),
        ({"nothing": {}}, {}, r"data\.streams\.nothing: .*nothing does not exist"),
    ],
)
def test_weights_that_make_no_sense(folders, weights, changes, message):
    with pytest.raises(UserError, match=message):
        read_data(config(folders, weights, **changes))


def test_the_same_folder_twice(folders):
    options = config(folders, {"a": {}, "b": {}})
    options.streams["b"].path = f"{folders}/./a/"
    with pytest.raises(UserError, match=r"data\.streams\.a and data\.streams\.b are the same folder.*repeat"):
        read_data(options)


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ({"a": {"proportion": 99}, "c": {"proportion": 1}}, {"batching_method": "stratified"}, "none in a batch of 8"),
        ({"a": {}, "c": {"choose": 7}}, {"batching_method": "per_stream"}, "only 7 rows per epoch, fewer than a batch"),
        ({"a": {}, "c": {"repeat": 0.01}}, {}, r"streams\.c .*none of its rows"),
        ({"a": {"choose": 3}, "c": {"choose": 4}}, {}, "7 rows, fewer than one batch of 8"),
    ],
)
def test_streams_that_batches_cannot_be_made_of(folders, weights, changes, message):
    with pytest.raises(UserError, match=message):
        loader_of(config(folders, weights, **changes))


def test_evaluation_of_a_stream_without_rows_for_it(folders):
    options = config(folders, {"a": {}, "c": {}})
    with pytest.raises(UserError, match=r"data\.streams\.c \(.*no rows in split 'val'.*data\.eval_streams"):
        build_data_spec(options, "eval", 4, read_data(options), seed=0)
    options = config(folders, {"a": {}, "c": {}}, eval_streams=["a"])
    assert build_data_spec(options, "eval", 4, read_data(options), seed=0).num_samples == 5
