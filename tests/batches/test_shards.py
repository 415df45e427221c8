"""Loaders of a folder of shards: order, resuming, resources, and refusal of shards that do not fit."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time

import programs
import pytest
from launcher import launch
from small_shards import LENGTH, WORDS, make_rows, make_tokenizer, open_files, write_shards

from electra_composer.batches.checks import check_shards
from electra_composer.batches.shards import build_data_spec, build_dataloader, read_meta
from electra_composer.config import ShardsConfig
from electra_composer.errors import UserError
from electra_composer.vocabulary import load_tokenizer


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return write_shards(folder / "out", make_tokenizer(folder))


def config(path, **changes):
    return ShardsConfig(path=str(path), max_seq_length=LENGTH, **{"num_workers": 0, **changes})


def test_a_split_batch_keeps_the_number_of_tokens_of_the_whole(shards):
    spec = build_data_spec(config(shards), "train", 8, read_meta(shards), seed=0)
    batch = next(iter(spec.dataloader))
    parts = spec.split_batch(batch, 2)
    assert [len(part["input_ids"]) for part in parts] == [2, 2, 2, 2]
    assert {part["num_tokens"] for part in parts} == {batch["num_tokens"]}
    assert spec.get_num_tokens_in_batch(batch) == int((batch["sequence_ids"] > 0).sum())
    assert spec.get_num_samples_in_batch(batch) == 8


def ids_of(batches):
    return [row for batch in batches for row in batch["input_ids"].tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_once_and_shuffled_anew(shards, workers):
    meta = read_meta(shards)
    expected = sorted(row.input_ids.tolist() + [0] * (LENGTH - len(row.input_ids)) for row in make_rows(40))
    loader = build_dataloader(
        config(shards, num_workers=workers), meta, "train", 8, shuffle=True, drop_last=True, seed=1
    )
    epochs = [ids_of(loader) for _ in range(2)]
    assert len(loader) == 5
    for epoch in epochs:
        assert sorted(epoch) == expected
    assert epochs[0] != epochs[1]


def test_training_drops_the_partial_batch_and_evaluation_keeps_it(shards):
    meta = read_meta(shards)
    train = build_data_spec(config(shards, num_workers=2), "train", 16, meta, seed=0).dataloader
    assert [len(batch["input_ids"]) for batch in train] == [16, 16]
    assert len(train) == 2
    evaluation = build_data_spec(config(shards), "eval", 4, meta, seed=0).dataloader
    assert [len(batch["input_ids"]) for batch in evaluation] == [4, 3]
    assert ids_of(evaluation) == [row.input_ids.tolist() + [0] * (LENGTH - len(row.input_ids)) for row in make_rows(7)]


def test_order_follows_the_seed(shards):
    meta = read_meta(shards)
    orders = [ids_of(build_data_spec(config(shards), "train", 8, meta, seed).dataloader) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_a_loader_resumes_in_the_middle_of_an_epoch(shards):
    meta = read_meta(shards)
    whole = build_data_spec(config(shards), "train", 8, meta, seed=5).dataloader
    batches = []
    for batch in whole:
        batches.append(batch)
        if len(batches) == 2:
            state = whole.state_dict()
    resumed = build_data_spec(config(shards), "train", 8, meta, seed=5).dataloader
    resumed.load_state_dict(state)
    assert ids_of(resumed) == ids_of(batches[2:])


def test_workers_end_at_once_even_if_the_loader_is_part_of_a_circle(shards):
    spec = build_data_spec(config(shards, num_workers=1), "train", 8, read_meta(shards), seed=0)
    circle = [spec]
    circle.append(circle)
    for _ in spec.dataloader:
        pass
    # Workaround (torch 2.7): `_iterator` and `_workers` are private; goes when DataLoader lists its workers.
    worker = spec.dataloader._iterator._workers[0]
    assert worker.is_alive()
    start = time.monotonic()
    del spec, circle
    gc.collect()
    assert not worker.is_alive()
    assert time.monotonic() - start < 4  # PyTorch waits five seconds for a worker that was not told to exit


def test_remote_shards_are_fetched_with_meta_and_tokenizer(shards, tmp_path):
    cache = tmp_path / "cache"
    meta = read_meta(str(cache), remote=shards)
    check_shards(meta, load_tokenizer(meta.tokenizer_folder), LENGTH)
    spec = build_data_spec(config(cache, remote=shards), "train", 8, meta, seed=0)
    assert len(ids_of(spec.dataloader)) == 40


def test_compressed_shards_are_read(tmp_path):
    path = write_shards(tmp_path / "out", make_tokenizer(tmp_path), compression="zstd")
    assert (tmp_path / "out/train/00000/shard.00000.mds.zstd").exists()
    assert len(ids_of(build_data_spec(config(path), "train", 8, read_meta(path), seed=0).dataloader)) == 40


# Shards that are refused.


def copy(shards, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(shards, path)
    return path


def test_missing_shards_name_the_converter(tmp_path):
    with pytest.raises(UserError, match=r"does not exist .* data_prep/convert_owt.py --out"):
        read_meta(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="is not a folder of shards"):
        read_meta(str(tmp_path))
    with pytest.raises(UserError, match="no shards could be fetched from"):
        read_meta(str(tmp_path / "cache"), remote=str(tmp_path / "nothing"))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": 99}', '{"format_version": 1, "seed": 0}'])
def test_unreadable_meta(shards, tmp_path, text):
    path = copy(shards, tmp_path)
    (path / "meta.json").write_text(text)
    with pytest.raises(UserError, match=r"meta.json is damaged or not the metadata of shards"):
        read_meta(str(path))


def test_another_tokenizer_or_length(shards, tmp_path):
    meta = read_meta(shards)
    check_shards(meta, load_tokenizer(meta.tokenizer_folder), LENGTH)
    with pytest.raises(UserError, match=r"rows of 16 tokens, but max_seq_length is 32"):
        check_shards(meta, load_tokenizer(meta.tokenizer_folder), 32)
    other = make_tokenizer(tmp_path, [*WORDS, "more"])
    with pytest.raises(UserError, match=r"words \(205 entries, SHA-256 \w{8}…\), not .* \(206 entries, SHA-256 \w{8}…"):
        check_shards(meta, other, LENGTH)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shard, index: shard.unlink(), "shard.00000.mds is missing"),
        (lambda shard, index: os.truncate(shard, 100), "shard.00000.mds has 100 bytes instead of"),
        (lambda shard, index: index.unlink(), "index.json cannot be read: No such file or directory"),
        (lambda shard, index: os.truncate(index, 50), "index.json is damaged or not an index of shards"),
        (lambda shard, index: index.write_text('{"version": 2, "shards": []}'), "lists 0 rows, but meta.json 40"),
    ],
)
def test_damaged_splits(shards, tmp_path, damage, message):
    path = copy(shards, tmp_path)
    damage(path / "train/00000/shard.00000.mds", path / "train/index.json")
    with pytest.raises(UserError, match=message):
        build_data_spec(config(path), "train", 8, read_meta(str(path)), seed=0)


def test_batches_that_the_rows_do_not_fill(shards):
    meta = read_meta(shards)
    with pytest.raises(UserError, match=r"'train' has 40 rows, fewer than one batch of 41 rows on each of 1 device"):
        build_data_spec(config(shards), "train", 41, meta, seed=0)


def test_split_that_is_not_there_or_empty(shards, tmp_path):
    with pytest.raises(UserError, match=r"no rows in split 'test' \(available: train, val\)"):
        build_data_spec(config(shards, eval_split="test"), "eval", 4, read_meta(shards), seed=0)
    path = write_shards(tmp_path / "out", make_tokenizer(tmp_path), val=0)
    with pytest.raises(UserError, match=r"no rows in split 'val' \(available: train\).*--val-fraction"):
        build_data_spec(config(path), "eval", 4, read_meta(path), seed=0)


PROGRAM = """
import json, sys
from composer.utils import dist
from electra_composer.config import ShardsConfig
from electra_composer.batches.shards import build_data_spec, read_meta
dist.initialize_dist("cpu")
config = ShardsConfig(path=sys.argv[1], max_seq_length=16, num_workers=1)
spec = build_data_spec(config, "train", 5, read_meta(sys.argv[1]), 0)
rows = [row for batch in spec.dataloader for row in batch["input_ids"].tolist()]
with open(f"{sys.argv[2]}/{dist.get_global_rank()}.json", "w") as file:
    json.dump([len(spec.dataloader), rows], file)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc")
def test_loaders_that_are_gone_hold_no_files_open(shards):
    meta, counts = read_meta(shards), []
    for _ in range(3):
        options = {"batch_size": 4, "shuffle": True, "drop_last": True, "seed": 0}
        pair = [build_dataloader(config(shards), meta, split, **options) for split in ("train", "val")]
        next(iter(pair[0]))  # not exhausted, so that its threads are running
        assert open_files() - (counts or [0])[-1] >= 12  # six blocks each
        del pair
        time.sleep(0.1)  # until the threads notice
        gc.collect()
        counts.append(open_files())
    assert counts[0] == counts[1] == counts[2]


BUILDER = """
import sys, time
from electra_composer.config import ShardsConfig
from electra_composer.batches.shards import build_dataloader, read_meta
meta = read_meta(sys.argv[1])
config = ShardsConfig(path=sys.argv[1], max_seq_length=meta.max_seq_length, num_workers=0)
print("ready", flush=True)
sys.stdin.readline()
kept = []
for _ in range(6):
    kept.append(build_dataloader(config, meta, "train", 4, shuffle=True, drop_last=True, seed=0))
"""


@pytest.mark.slow
def test_runs_that_start_together_share_no_memory(shards):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [programs.Program([sys.executable, "-c", BUILDER, shards], **pipes) for _ in range(3)]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_share_the_rows(shards, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    launch(2, str(tmp_path / "program.py"), str(shards), str(tmp_path))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [batches for batches, _ in ranks] == [4, 4]
    assert sorted(ranks[0][1] + ranks[1][1]) == sorted(
        row.input_ids.tolist() + [0] * (LENGTH - len(row.input_ids)) for row in make_rows(40)
    )


@pytest.mark.distributed
@pytest.mark.slow
def test_a_name_that_is_freed_between_the_ranks_searches(shards, tmp_path):
    """Another run exits after rank 0 has searched for a free name: rank 1 takes the name that rank 0 found."""
    freed = """
import itertools
from streaming.base.shared import prefix
prefix._each_prefix_int = lambda: itertools.count(500_000 * (dist.get_global_rank() == 0))
"""
    (tmp_path / "program.py").write_text(PROGRAM.replace("config =", f"{freed}config ="))
    launch(2, str(tmp_path / "program.py"), str(shards), str(tmp_path))
    assert [json.loads((tmp_path / f"{rank}.json").read_text())[0] for rank in (0, 1)] == [4, 4]


def test_a_resumed_run_keeps_no_file_open_for_each_checkpoint(shards):
    """Streaming opens one at each checkpoint and epoch: after about 900 the limit would be reached."""
    loader = build_dataloader(config(shards), read_meta(shards), "train", 4, shuffle=True, drop_last=True, seed=1)
    dataset = loader.dataset
    next(iter(loader))
    dataset.load_state_dict(dataset.state_dict(4, True))
    opened = []
    for _ in range(3):
        assert len(list(loader)) > 1
        assert dataset.state_dict(4, True)["sample_in_epoch"] == 4
        opened.append(len(os.listdir("/proc/self/fd")))
    assert len(set(opened)) == 1
