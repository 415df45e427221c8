"""Check that shards are complete and fit the tokenizer and configuration of a run."""

from __future__ import annotations

import os
from collections.abc import Iterable

from streaming import StreamingDataset
from transformers import PreTrainedTokenizerFast

from electra_composer.batches.streams import Folder, folders_of
from electra_composer.config import ShardsConfig
from electra_composer.errors import UserError
from electra_composer.storage.shard_folder import (
    CONVERTER,
    META,
    Meta,
    Shard,
    describe_tokenizer,
    is_inside,
    parse_index,
    read_description,
)


def check_shards(meta: Meta, tokenizer: PreTrainedTokenizerFast, max_seq_length: int) -> None:
    """Refuse shards that were made for another tokenizer or length.

    Raises:
        UserError: with both values.
    """
    given = describe_tokenizer(tokenizer, tokenizer.name_or_path or "data.tokenizer")
    if given.identity != meta.tokenizer.identity:
        raise UserError(
            f"the shards were made with the tokenizer {meta.tokenizer.label}, not {given.label}; set data.tokenizer to "
            "null to use the one stored with the shards, or convert again"
        )
    if max_seq_length != meta.max_seq_length:
        raise UserError(
            f"the shards have rows of {meta.max_seq_length} tokens, but max_seq_length is {max_seq_length}; set "
            f"data.max_seq_length={meta.max_seq_length}, or convert again with --max-seq-length {max_seq_length}"
        )


def check_split(config: ShardsConfig, meta: Meta, split: str, evaluation: bool = False) -> None:
    """Refuse a split that is empty, or whose local files do not match its index.

    Only names and sizes are compared: hashing every shard would take minutes on a large corpus.

    Raises:
        UserError: naming the file, or the available splits.
    """
    for folder in folders_of(config, meta, evaluation):
        _check_folder(folder, split, evaluation)


def _check_folder(folder: Folder, split: str, evaluation: bool) -> None:
    counts = folder.meta.splits
    if split not in counts or not counts[split].rows:
        present = ", ".join(name for name, of_split in counts.items() if of_split.rows)
        raise UserError(
            f"{folder.label}: no rows in split {split!r} (available: {present}); convert with another --val-fraction"
            + (", or name the other streams in data.eval_streams" if evaluation and folder.name else "")
        )
    if folder.remote is not None:
        return  # Streaming downloads its files later and checks their hashes
    path = os.path.join(folder.path, split)
    index = os.path.join(path, "index.json")
    shards = read_description(index, parse_index, "an index of shards")
    check_names(path, [file.basename for shard in shards for file in shard.files])
    rows = sum(shard.samples for shard in shards)
    broken = [message for shard in shards if (message := _broken_shard(path, shard))]
    if broken:
        raise UserError(f"{broken[0]}; copy the shards again or recreate them with {CONVERTER}")
    if rows != counts[split].rows:
        raise UserError(f"{index} lists {rows:,} rows, but {META} {counts[split].rows:,}; recreate the shards")


def check_names(path: str, names: Iterable[str]) -> None:
    """Refuse an index with file names outside its folder, which would make Streaming read, overwrite or delete others.

    Subfolders are allowed: `00003/shard.00000.mds`.

    Raises:
        UserError: naming the file.
    """
    for name in names:
        if not is_inside(name):
            raise UserError(
                f"{path}: the index names {name!r}, which is outside the folder; expected shards written by "
                f"{CONVERTER}, which have no such names"
            )


def _broken_shard(folder: str, shard: Shard) -> str | None:
    """Describe what is wrong with a shard's files; either form, compressed or not, is enough."""
    for file in shard.files:
        name = os.path.join(folder, file.basename)
        size = os.path.getsize(name) if os.path.isfile(name) else None
        if size == file.bytes:
            return None
    return f"{name} is missing" if size is None else f"{name} has {size:,} bytes instead of {file.bytes:,}"


def check_index(dataset: StreamingDataset, folders: list[Folder], split: str) -> None:
    """Check the indices that a dataset has read, which for remotes were not available to :func:`check_split`.

    Raises:
        UserError: the number of rows differs from `meta.json`, or see :func:`check_names`.
    """
    for folder, rows in zip(folders, dataset.samples_per_stream.tolist(), strict=True):
        if rows != folder.meta.splits[split].rows:
            raise UserError(
                f"{folder.label}: the index of split {split!r} lists {rows:,} rows, but {META} "
                f"{folder.meta.splits[split].rows:,}; empty the cache, copy the shards again, or recreate them"
            )
    files = [file for shard in dataset.shards for file in (shard.raw_data, shard.zip_data) if file is not None]
    check_names(", ".join(folder.label for folder in folders), [file.basename for file in files])
