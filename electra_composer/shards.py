"""From a folder of shards to what Composer's `Trainer` takes: checks, the loader, and how batches are counted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from composer.core import DataSpec
from streaming.base.storage.download import CloudDownloader
from streaming.base.util import wait_for_file_to_exist
from streaming.base.world import World
from transformers import PreTrainedTokenizerFast

from electra_composer.config import ShardsConfig
from electra_composer.errors import UserError
from electra_composer.interrupts import leave_signals_to_parent
from electra_composer.row_dataset import Batch, RowDataset, RowLoader
from electra_composer.shard_folder import META, TOKENIZER, Meta
from electra_composer.vocabulary import special_ids, vocabulary_sha256

CONVERT = "data_prep/convert_owt.py"


def read_meta(path: str, remote: str | None = None) -> Meta:
    """`meta.json` of a folder of shards. A remote's is fetched first, with the tokenizer, by one process of a node.

    Raises:
        UserError: no shards there, or not ones that this program can read.
    """
    file_name = os.path.join(path, META)
    if remote is not None and not os.path.isfile(file_name):
        if World.detect().is_local_leader:
            _fetch_meta(path, remote)
        else:
            wait_for_file_to_exist(file_name, 0.07, 60, f"{file_name} was not fetched from {remote}")
    if not os.path.isfile(file_name):
        found = "is no folder of shards" if os.path.isdir(path) else "does not exist"
        raise UserError(f"{path} {found} (no {META}); make it with: python {CONVERT} --out {path}")
    try:
        with open(file_name, encoding="utf-8") as file:
            return Meta.from_json(file.read(), path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file_name}: not readable as the description of shards: {error}; make them anew") from error


def _fetch_meta(path: str, remote: str) -> None:
    """Fetch the tokenizer, then give `meta.json` its name: who sees that sees all."""
    local = os.path.join(path, META)
    try:
        CloudDownloader.direct_download(os.path.join(remote, META), f"{local}.tmp")
        with open(f"{local}.tmp", encoding="utf-8") as file:
            meta = Meta.from_json(file.read(), path)
        for name in meta.tokenizer.files:
            if os.path.basename(name) != name:
                raise ValueError(f"tokenizer file {name!r} is not a plain name")
            CloudDownloader.direct_download(os.path.join(remote, TOKENIZER, name), os.path.join(path, TOKENIZER, name))
        os.replace(f"{local}.tmp", local)
    except Exception as error:  # every storage client has errors of its own
        raise UserError(f"no shards could be fetched from {remote}: {error}") from error


def check_shards(meta: Meta, tokenizer: PreTrainedTokenizerFast, max_seq_length: int) -> None:
    """Refuse shards that were made for another tokenizer or length.

    Raises:
        UserError: with both values.
    """
    sha256 = vocabulary_sha256(tokenizer)
    if sha256 != meta.tokenizer.vocabulary_sha256 or special_ids(tokenizer) != meta.tokenizer.special_ids:
        raise UserError(
            f"the shards were made with the tokenizer {meta.tokenizer.name} ({meta.tokenizer.vocab_size} entries, "
            f"SHA-256 {meta.tokenizer.vocabulary_sha256[:8]}…), but {tokenizer.name_or_path or 'data.tokenizer'} has "
            f"{len(tokenizer)} entries, SHA-256 {sha256[:8]}…; set data.tokenizer to null for the one beside the "
            "shards, or convert anew"
        )
    if max_seq_length != meta.max_seq_length:
        raise UserError(
            f"the shards have rows of {meta.max_seq_length} tokens, but max_seq_length is {max_seq_length}; set "
            f"data.max_seq_length={meta.max_seq_length}, or convert anew with --max-seq-length {max_seq_length}"
        )


def check_split(config: ShardsConfig, meta: Meta, split: str) -> None:
    """Refuse a split that is empty, or whose local files are not those that its index lists, whole.

    Only names and sizes are compared: reading every shard to hash it would take minutes on a large corpus.

    Raises:
        UserError: naming the file, or the splits there are.
    """
    if split not in meta.splits or not meta.splits[split].rows:
        present = ", ".join(name for name, counts in meta.splits.items() if counts.rows)
        raise UserError(
            f"{config.path}: no rows in split {split!r} (there are: {present}); convert with another --val-fraction"
        )
    if config.remote is not None:
        return  # what is not here yet, Streaming fetches and checks by its hash
    folder = os.path.join(config.path, split)
    index = os.path.join(folder, "index.json")
    try:
        with open(index, encoding="utf-8") as file:
            shards = json.load(file)["shards"]
        rows = sum(shard["samples"] for shard in shards)
        broken = [message for shard in shards if (message := _broken_shard(folder, shard))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: not a readable index of shards ({error}); make them anew with {CONVERT}") from error
    if broken:
        raise UserError(f"{broken[0]}; copy the shards again, or make them anew with {CONVERT}")
    if rows != meta.splits[split].rows:
        raise UserError(f"{index} lists {rows:,} rows, but {META} {meta.splits[split].rows:,}; make the shards anew")


def _broken_shard(folder: str, shard: dict[str, Any]) -> str | None:
    """What is wrong with a shard's file; either of its forms, compressed or not, is enough."""
    forms = [form for form in (shard["raw_data"], shard["zip_data"]) if form is not None]
    if any(_size(os.path.join(folder, form["basename"])) == form["bytes"] for form in forms):
        return None
    name = os.path.join(folder, forms[-1]["basename"])
    size = _size(name)
    return f"{name} " + ("is missing" if size is None else f"has {size:,} bytes instead of {forms[-1]['bytes']:,}")


def _size(path: str) -> int | None:
    return os.path.getsize(path) if os.path.isfile(path) else None


def build_dataloader(
    config: ShardsConfig, meta: Meta, split: str, batch_size: int, *, shuffle: bool, drop_last: bool, seed: int
) -> RowLoader:
    """A loader of batches whose state resumes in the middle of an epoch. Build it after `torch.distributed` is set up.

    Args:
        config: paths and number of workers.
        meta: of these shards, from :func:`read_meta`.
        split: such as `train`.
        batch_size: rows per device.
        shuffle: a new order each epoch.
        drop_last: leave out a last batch that is not full, so that all have one shape.
        seed: of the order.

    Raises:
        UserError: split missing or incomplete, or too small for one batch per device.
    """
    check_split(config, meta, split)
    rows, ranks = meta.splits[split].rows, World.detect().num_ranks
    if batch_size < 1:
        raise UserError(f"the batch size per device is {batch_size}; expected at least 1")
    if config.download_attempts < 1:
        raise UserError(f"data.download_attempts is {config.download_attempts}; expected at least 1")
    if drop_last and rows < batch_size * ranks:
        raise UserError(
            f"{config.path}: split {split!r} has {rows:,} rows, fewer than one batch of {batch_size:,} rows on each of "
            f"{ranks} device{'s' if ranks > 1 else ''} ({batch_size * ranks:,}); take a smaller batch size or more text"
        )
    try:
        dataset = RowDataset(
            config, split, batch_size, shuffle, seed, meta.max_seq_length, meta.tokenizer.special_ids["pad"], drop_last
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{config.path}: the shards of split {split!r} cannot be opened: {error}") from error
    return RowLoader(
        dataset,
        batch_size=batch_size,
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        drop_last=drop_last,
        collate_fn=dataset.collate,
        worker_init_fn=leave_signals_to_parent if config.num_workers > 0 else None,
    )


def build_data_spec(
    config: ShardsConfig,
    purpose: Literal["train", "eval"],
    batch_size: int,
    meta: Meta,
    seed: int,
    batch_transforms: Callable[[Batch], Batch] | None = None,
    microbatch_transforms: Callable[[Batch], Batch] | None = None,
) -> DataSpec:
    """The loader of training or of evaluation for Composer: samples are rows, tokens those that are not padding.

    Training reads `config.train_split`, shuffled if `config.shuffle`, in full batches only. Evaluation reads all of
    `config.eval_split` in its order; its last batch may be smaller.

    Args:
        batch_size: rows per device.
        batch_transforms: applied to each batch on the CPU, before it is split into microbatches.
        microbatch_transforms: applied to each microbatch once it is on the device.

    Raises:
        UserError: see :func:`build_dataloader`.
    """
    train = purpose == "train"
    split = config.train_split if train else config.eval_split
    loader = build_dataloader(
        config, meta, split, batch_size, shuffle=train and config.shuffle, drop_last=train, seed=seed
    )
    return DataSpec(
        loader,
        num_samples=meta.splits[split].rows,
        num_tokens=meta.splits[split].tokens,
        batch_transforms=batch_transforms,
        microbatch_transforms=microbatch_transforms,
        get_num_samples_in_batch=_num_rows,
        get_num_tokens_in_batch=_num_tokens,
    )


def _num_rows(batch: Batch) -> int:
    return len(batch["input_ids"])


def _num_tokens(batch: Batch) -> int:
    return int(batch["num_tokens"])
