"""Several folders mixed as streams: rows of each in an epoch, batching methods, and exact resuming."""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import shutil
import time
from collections import Counter

import numpy as np
import pytest
import torch
from batch_loaders import move_to_subfolders
from comparison import Kill, weights
from small_shards import open_files
from small_streams import ROWS, config, loader_of
from streaming.base.batching import generate_work
from streaming.base.world import World

from electra_composer.batches.baselines import unigram_counts
from electra_composer.batches.checks import check_split
from electra_composer.batches.row_reader import reader_of_split
from electra_composer.batches.shards import build_data_spec, read_data
from electra_composer.batches.streams import batches_per_epoch, describe_streams, plan_epoch
from electra_composer.config import PretrainConfig, StreamConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.pretrain import main as pretrain
from electra_composer.training import trainer


def rows_of(batches):
    """Return (stream, number) of each row, grouped by batch."""
    return [[("abc"[row[1] - 5], row[2] - 10) for row in batch["input_ids"].tolist()] for batch in batches]


def taken(batches):
    return Counter(stream for batch in rows_of(batches) for stream, _ in batch)


PROPORTIONS = {"a": {"proportion": 0.7}, "b": {"proportion": 0.2}, "c": {"proportion": 0.1}}


@pytest.mark.parametrize(
    ("weights", "epoch_size", "expected"),
    [
        ({"a": {}, "b": {}, "c": {}}, None, {"a": 60, "b": 25, "c": 10}),
        (PROPORTIONS, None, {"a": 66.5, "b": 19, "c": 9.5}),
        (
            {"a": {"proportion": 14}, "b": {"proportion": 4}, "c": {"proportion": 2}},
            None,
            {"a": 66.5, "b": 19, "c": 9.5},
        ),
        (PROPORTIONS, 200, {"a": 140, "b": 40, "c": 20}),
        (PROPORTIONS, "0.1k", {"a": 70, "b": 20, "c": 10}),
        ({"a": {}, "b": {}}, 170, {"a": 120, "b": 50}),
        ({"a": {"repeat": 0.5}, "b": {"repeat": 2}, "c": {}}, None, {"a": 30, "b": 50, "c": 10}),
        ({"a": {"choose": 7}, "c": {"choose": 30}}, None, {"a": 7, "c": 30}),
    ],
)
def test_an_epoch_has_of_each_stream_what_was_asked_for(folders, weights, epoch_size, expected):
    options = config(folders, weights, epoch_size=epoch_size)
    spec = build_data_spec(options, "train", 1, read_data(options), seed=3)
    batches = list(spec.dataloader)
    counts = taken(batches)
    assert sum(counts.values()) == sum(expected.values())
    assert all(abs(counts[name] - wanted) < 1 for name, wanted in expected.items())
    times = Counter(itertools.chain.from_iterable(rows_of(batches)))
    for (stream, _), count in times.items():
        assert count in (counts[stream] // ROWS[stream], -(-counts[stream] // ROWS[stream]))
    assert spec.num_samples == sum(counts.values())
    assert spec.num_tokens == sum(count * (4 + "abc".index(name)) for name, count in counts.items())
    assert spec.num_tokens == sum(batch["num_tokens"] for batch in batches)
    text = describe_streams(options, read_data(options), seed=3)
    for name, count in counts.items():
        assert re.search(rf"{name} +{ROWS[name]} +{count} +{100 * count / sum(counts.values()):.2f}%", text)
    assert taken(spec.dataloader) == counts


@pytest.mark.parametrize("method", ["random", "stratified", "per_stream"])
def test_batches_are_the_same_with_workers_and_go_on_in_the_middle_of_an_epoch(folders, method):
    options = config(folders, PROPORTIONS, batching_method=method, epoch_size=200)
    whole = loader_of(options)
    batches = []
    for batch in whole:
        batches.append(batch)
        if len(batches) == 3:
            state = json.loads(json.dumps(whole.state_dict()))
    assert len(batches) == len(whole)
    rows = rows_of(batches)
    next_epoch = rows_of(whole)
    assert next_epoch != rows
    per_batch = [Counter(stream for stream, _ in batch) for batch in rows]
    if method == "stratified":
        assert all(counts == {"a": 6, "b": 1, "c": 1} for counts in per_batch)
    if method == "per_stream":
        assert all(len(counts) == 1 for counts in per_batch)
        assert Counter(next(iter(counts)) for counts in per_batch) == {"a": 140 // 8, "b": 40 // 8, "c": 20 // 8}
    with_workers = loader_of(config(folders, PROPORTIONS, batching_method=method, epoch_size=200, num_workers=2))
    assert rows_of(with_workers) == rows
    for workers in (0, 2):
        resumed = loader_of(config(folders, PROPORTIONS, batching_method=method, epoch_size=200, num_workers=workers))
        resumed.load_state_dict(state)
        assert rows_of(resumed) == rows[3:]
        assert rows_of(resumed) == next_epoch


def test_going_on_with_another_mixture_is_said(folders, capsys):
    loader = loader_of(config(folders, PROPORTIONS))
    next(iter(loader))
    state = loader.state_dict()
    same = loader_of(config(folders, PROPORTIONS))
    same.load_state_dict(state)
    older = loader_of(config(folders, PROPORTIONS))
    older.load_state_dict({key: value for key, value in state.items() if key != "rows_of_streams"})
    assert capsys.readouterr().err == ""
    other = loader_of(config(folders, {"a": {"proportion": 0.5}, "b": {"proportion": 0.5}}))
    other.load_state_dict(state)
    said = capsys.readouterr().err
    assert re.search(r"warning: the checkpoint's data .*\[\[60, 6[67]\], \[25, (19|20)\]", said)
    assert re.search(r"now: \[\[60, 4[23]\], \[25, 4[23]\]\].* after 8 rows", said)
    assert taken(other)["a"] > 0


def test_as_many_batches_as_streaming_makes(folders):
    """Compared with Streaming's own partition of an epoch, for several numbers of nodes, ranks and workers."""
    for epoch_size, batch_size in ((200, 4), (333, 5), (500, 7)):
        options = config(folders, {"a": {"proportion": 3}, "b": {"proportion": 2}}, epoch_size=epoch_size)
        dataset = loader_of(options, batch_size).dataset
        shares = plan_epoch(options, read_data(options), "train", seed=3)
        for nodes, ranks, workers in ((1, 1, 3), (1, 2, 1), (1, 3, 2), (2, 2, 1)):
            world = World(num_nodes=nodes, ranks_per_node=ranks, workers_per_rank=workers, worker=0)
            dataset.num_canonical_nodes, dataset.shuffle_block_size = nodes, 1 << 18
            for method in ("stratified", "per_stream"):
                work = generate_work(method, dataset, world, 0, 0)
                full = (work[0, 0].reshape(-1, batch_size) >= 0).all(axis=1).sum()
                assert batches_per_epoch(shares, method, batch_size, world) == full, (method, nodes, ranks, workers)


def test_evaluation_has_every_row_once(folders):
    weights = {"a": {"proportion": 9}, "b": {"proportion": 1}}
    everything = [("a", number) for number in range(5)] + [("b", number) for number in range(3)]
    for names, expected in ((None, everything), (["b"], everything[5:]), (["a"], everything[:5])):
        options = config(folders, weights, eval_streams=names, batching_method="stratified", epoch_size=40)
        spec = build_data_spec(options, "eval", 4, read_data(options), seed=0)
        assert list(itertools.chain.from_iterable(rows_of(spec.dataloader))) == expected
        assert spec.num_samples == len(expected)
        assert spec.num_tokens == sum(4 if name == "a" else 5 for name, _ in expected)


def test_frequencies_are_those_of_an_epoch(folders):
    options = config(folders, {"a": {"choose": 30}, "b": {"choose": 50}})
    counts = unigram_counts(options, read_data(options), "train")
    assert counts[5] == 30
    assert counts[6] == 50
    assert counts[9] == 50
    assert counts[[0, 2, 3]].sum() == 0


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc")
def test_loaders_that_are_gone_hold_no_files_open(folders):
    counts = []
    for _ in range(3):
        loader = loader_of(config(folders, PROPORTIONS))
        next(iter(loader))
        del loader
        time.sleep(0.1)
        gc.collect()
        counts.append(open_files())
    assert counts[0] == counts[1] == counts[2]


def test_large_streams_are_drawn_from_in_pieces(folders, monkeypatch):
    monkeypatch.setattr("electra_composer.batches.streaming_fixes.PICKS", 10)
    loader = loader_of(config(folders, PROPORTIONS), drop_last=False)
    assert loader.dataset.sampling_granularity == 6
    assert 66 <= taken(loader)["a"] <= 67


def test_shards_in_subfolders_of_a_split(folders, tmp_path):
    """The layout that the converter writes: `train/00003/shard.00000.mds`, with one index."""
    plain = config(folders, {"a": {}, "b": {}})
    for name in ("a", "b"):
        shutil.copytree(folders / name, tmp_path / name)
        for split in ("train", "val"):
            move_to_subfolders(tmp_path / name / split, 1)
    moved = config(tmp_path, {"a": {}, "b": {}})
    assert rows_of(loader_of(moved)) == rows_of(loader_of(plain))
    reader = reader_of_split(str(tmp_path / "a"), "train")
    assert (reader.read(np.arange(60)).input_ids.reshape(60, 4)[:, 2] == 10 + np.arange(60)).all()
    (tmp_path / "b/train/00003/shard.00000.mds").unlink()
    with pytest.raises(UserError, match=r"b/train/00003/shard\.00000\.mds is missing"):
        check_split(moved, read_data(moved), "train")
    assert reader_of_split(str(tmp_path / "b"), "train") is None


def in_yaml(tiny_yaml, *overrides):
    return load_config(str(tiny_yaml), list(overrides), PretrainConfig)


def test_the_yaml_has_a_path_or_streams(tiny_yaml, folders):
    streams = [f"data.streams.a.path={folders}/a", "data.streams.a.proportion=1"]
    with pytest.raises(UserError, match=r"data\.path .* and data\.streams \(a\) are both given"):
        in_yaml(tiny_yaml, *streams)
    read = in_yaml(tiny_yaml, "data.path=", *streams).data
    assert (read.path, read.streams) == ("", {"a": StreamConfig(path=f"{folders}/a", proportion=1.0)})
    text = tiny_yaml.read_text()
    tiny_yaml.write_text(re.sub(r"path: \S+, ", "", text))
    assert in_yaml(tiny_yaml, *streams).data.streams == read.streams
    for nothing in ([], ["data.path="], ["data.path=''"], ["data.path=null"]):
        with pytest.raises(UserError, match=r"no value for data\.path; set it"):
            in_yaml(tiny_yaml, *nothing)
    with pytest.raises(UserError, match=r"no value for data\.streams\.a\.path"):
        in_yaml(tiny_yaml, "data.streams.a.proportion=1")
    with pytest.raises(
        UserError, match=r"unknown key data\.streams\.a\.propotion; did you mean data\.streams\.a\.prop"
    ):
        in_yaml(tiny_yaml, *streams, "data.streams.a.propotion=1")
    with pytest.raises(UserError, match=r"data\.streams\.a"):
        in_yaml(tiny_yaml, f"data.streams.a={folders}/a")


@pytest.mark.slow
def test_a_killed_run_over_streams_goes_on_exactly(shards, tiny_yaml, tmp_path, capsys, monkeypatch):
    second = tmp_path / "second"
    shutil.copytree(shards, second)
    streams = [
        "data.path=",
        f"data.streams.one={{path: {shards}, proportion: 3}}",
        f"data.streams.two={{path: {second}, proportion: 1}}",
        "data.batching_method=stratified",
        "data.epoch_size=96",
        "trainer.max_duration=16ba",
        "trainer.eval_interval=16ba",
    ]
    whole = pretrain(in_yaml(tiny_yaml, *streams, f"checkpoints.folder={tmp_path}/whole"))
    assert re.search(r"one +\d+ +72 +75\.00%", capsys.readouterr().out)
    rows = 2 * read_data(in_yaml(tiny_yaml, *streams).data).streams["one"].splits["val"].rows
    assert whole.state.eval_timestamp.sample == rows
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "build_callbacks", lambda config: [Kill(after=10)])
        with pytest.raises(KeyboardInterrupt):
            pretrain(in_yaml(tiny_yaml, *streams))
    continued = pretrain(in_yaml(tiny_yaml, *streams))  # from batch 8 of the 12 of its first epoch
    assert continued.state.timestamp.epoch == whole.state.timestamp.epoch
    expected = weights(whole)
    for name, tensor in weights(continued).items():
        assert torch.equal(tensor, expected[name]), name
