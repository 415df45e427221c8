"""Write small folders of shards without the converter."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from streaming import LocalDataset, MDSWriter

from electra_composer.corpus.examples import Row
from electra_composer.corpus.folder_writer import ShardFolder
from electra_composer.storage.shard_folder import Meta, SplitCounts, describe_tokenizer
from electra_composer.vocabulary import load_tokenizer

LENGTH = 16
WORDS = [f"w{i}" for i in range(200)]


def make_tokenizer(folder, words=WORDS):
    path = Path(folder) / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, ""]))
    return load_tokenizer(str(path))


def make_rows(count, seed=0):
    """Make rows of 1 to 3 examples; the first word of a row encodes its number."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        ids, lengths = [], []
        for example in range(rng.integers(1, 4)):
            a, b = int(rng.integers(3, 5)), int(rng.choice([0, 0, 2]))
            if len(ids) + a + b > LENGTH:
                break
            words = rng.integers(5, 205, a + b)
            words[0] = words[a - 1] = words[-1] = 3
            words[0] = 2
            if example == 0:
                words[1] = 5 + number % 200
            ids += words.tolist()
            lengths += [a, b]
        rows.append(Row(np.array(ids, np.int32), np.array(lengths, np.uint16)))
    return rows


def write_shards(out, tokenizer, train=40, val=7, **options):
    counts = {}
    with ShardFolder(str(out), **options) as folder:
        part = folder.begin("uint16", ("train", "val"))
        for split, number in (("train", train), ("val", val)):
            rows = make_rows(number)
            for row in rows:
                part.write(split, row)
            counts[split] = SplitCounts(1, number, number, sum(len(row.input_ids) for row in rows))
        meta = Meta(describe_tokenizer(tokenizer, "words"), LENGTH, "packed", 0, {}, counts)
        folder.finish(meta, tokenizer)
    return str(out)


def open_files():
    return len(os.listdir("/proc/self/fd"))


def copy_to_many_files(shards: Path, folder: Path) -> Path:
    """Copy a folder of shards, with its rows in more than ten files per split; return the copy."""
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
