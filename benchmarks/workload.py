"""Data and configuration of the pretraining-step benchmark, the same for every variant.

By default synthetic rows: one example that fills the row, as in most rows of OpenWebText, with tokens drawn uniformly
from the vocabulary; or the first rows of a folder of shards. The rows are written as shards by the package's own
writer, so that the trainer reads the same rows as the bare steps.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sizes import TINY
from streaming import LocalDataset
from transformers import PreTrainedTokenizerFast

from electra_composer.batches.checks import check_split
from electra_composer.batches.shards import build_data_spec, read_meta
from electra_composer.config import PretrainConfig, ShardsConfig
from electra_composer.config_loading import load_config
from electra_composer.corpus.examples import Row
from electra_composer.corpus.folder_writer import ShardFolder
from electra_composer.errors import UserError
from electra_composer.storage.shard_folder import Meta, SplitCounts, describe_tokenizer, id_dtype
from electra_composer.vocabulary import SPECIAL_TOKENS, load_tokenizer

YAMLS = Path(__file__).resolve().parent.parent / "yamls"
SPLITS = ("train", "val")


@dataclass
class Workload:
    """A folder of shards, one epoch of training rows for the benchmark, with its tokenizer."""

    folder: Path
    tokenizer: PreTrainedTokenizerFast
    meta: Meta

    def batches(self, config: PretrainConfig, count: int) -> list[dict[str, torch.Tensor]]:
        """Read the first `count` batches of the training split in order, on the CPU, by the package's loader."""
        shards = ShardsConfig(str(self.folder), config.data.max_seq_length, num_workers=0, shuffle=False)
        rows, pin_memory = config.trainer.global_train_batch_size, config.trainer.device == "gpu"
        loader = build_data_spec(shards, "train", rows, self.meta, config.seed, pin_memory=pin_memory)
        return [batch for batch, _ in zip(loader.dataloader, range(count), strict=False)]


def read_config(options: argparse.Namespace, folder: Path) -> PretrainConfig:
    """Load the YAML of the size with the benchmark's overrides, then the user's.

    The learning rate is tiny and constant, so that the weights stay finite.
    """
    name = "small" if options.size == "tiny" else options.size
    overrides = [
        *(TINY if options.size == "tiny" else ()),
        *([f"data.max_seq_length={options.length}"] if options.length else ()),
        f"data.path={folder / 'shards'}",
        "data.shuffle=false",
        f"seed={options.seed}",
        "optimizer.lr=1.0e-5",
        "schedule.warmup=0ba",
        f"trainer.global_train_batch_size={options.batch}",
        "trainer.device_train_microbatch_size=null",
        f"trainer.device_eval_batch_size={options.batch}",
        "trainer.max_duration=1000000ba",
        "trainer.eval_batches=1",
        f"trainer.device={options.device}",
        f"trainer.precision={options.precision}",
        f"trainer.compile={options.compile}",
        "trainer.log_interval=10ba",
        "trainer.progress_bar=false",
        f"checkpoints.folder={folder / 'run'}",
        "checkpoints.interval=null",
        "checkpoints.milestones=[]",
        "checkpoints.resume=false",
        *options.overrides,
    ]
    return load_config(str(YAMLS / f"{name}.yaml"), overrides, PretrainConfig)


def make_workload(options: argparse.Namespace, folder: Path, length: int, rows: int) -> Workload:
    """Write `rows` training rows and one batch of evaluation rows to `folder`.

    Args:
        options: `data`, `vocab`, `batch`, `seed` of the command line.
        folder: a new folder.
        length: tokens per row.
        rows: number of training rows.

    Raises:
        UserError: the shards given have rows of another length, or too few rows.
    """
    if options.data is None:
        tokenizer = make_tokenizer(options.vocab)
        source = synthetic_rows(np.random.default_rng(options.seed), len(tokenizer), length)
    else:
        tokenizer, source = _rows_of(options.data, length, rows + options.batch)
    counts = {split: SplitCounts() for split in SPLITS}
    with ShardFolder(str(folder)) as shards:
        part = shards.begin(id_dtype(len(tokenizer)), SPLITS)
        for split, count in zip(SPLITS, (rows, options.batch), strict=True):
            for _ in range(count):
                row = next(source)
                part.write(split, row)
                counts[split].rows += 1
                counts[split].examples += len(row.segment_lengths) // 2
                counts[split].tokens += len(row.input_ids)
        meta = Meta(describe_tokenizer(tokenizer, "benchmark"), length, "packed", options.seed, {}, counts)
        shards.finish(meta, tokenizer)
    return Workload(folder, tokenizer, read_meta(str(folder)))


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Build a placeholder WordPiece tokenizer with BERT's special tokens and `vocab_size` entries."""
    if vocab_size <= len(SPECIAL_TOKENS):
        raise UserError(f"--vocab {vocab_size}: expected more than the {len(SPECIAL_TOKENS)} special tokens")
    words = [f"w{index}" for index in range(vocab_size - len(SPECIAL_TOKENS))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join([*SPECIAL_TOKENS, *words]) + "\n", encoding="utf-8")
        return load_tokenizer(str(path))


def synthetic_rows(rng: np.random.Generator, vocab_size: int, length: int) -> Iterator[Row]:
    """Generate endless rows of one example `[CLS] A [SEP] B [SEP]` each, without padding."""
    first = length // 2
    cls_id, sep_id = SPECIAL_TOKENS.index("[CLS]"), SPECIAL_TOKENS.index("[SEP]")
    while True:
        ids = rng.integers(len(SPECIAL_TOKENS), vocab_size, length)
        ids[[0, first - 1, -1]] = cls_id, sep_id, sep_id
        yield Row(ids, np.array([first, length - first], np.uint16))


def _rows_of(path: str, length: int, needed: int) -> tuple[PreTrainedTokenizerFast, Iterator[Row]]:
    """Return the tokenizer and the first training rows of a folder of shards."""
    meta = read_meta(path)
    shards = ShardsConfig(path, length, num_workers=0)
    check_split(shards, meta, "train")
    if meta.max_seq_length != length:
        raise UserError(f"--data {path}: rows of {meta.max_seq_length} tokens; expected {length}: set --length")
    if meta.splits["train"].rows < needed:
        raise UserError(
            f"--data {path}: {meta.splits['train'].rows:,} training rows; expected at least {needed:,}: "
            "give more text, or a smaller --batch or --segment"
        )
    dataset = LocalDataset(local=path, split="train")
    rows = (Row(**dataset[index]) for index in range(needed))
    return load_tokenizer(meta.tokenizer_folder), rows
