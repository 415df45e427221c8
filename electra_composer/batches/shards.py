"""From a folder of shards to what Composer's `Trainer` takes: checks, the loader, and how batches are counted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from composer.core import DataSpec
from streaming import Stream
from streaming.base.world import World
from transformers import PreTrainedTokenizerFast

from electra_composer.batches.row_dataset import Batch, RowDataset, RowLoader, stream_of
from electra_composer.batches.streams import (
    Folder,
    batches_per_epoch,
    check_streams,
    describe_epoch,
    epoch_rows_wanted,
    folders_of,
    mix,
    weigh,
)
from electra_composer.batches.workers import loader_workers
from electra_composer.config import ShardsConfig
from electra_composer.errors import UserError
from electra_composer.storage.object_store import explain, fetch_meta, wait_for_leader
from electra_composer.storage.shard_folder import META, Meta, is_inside
from electra_composer.vocabulary import special_ids, vocabulary_sha256

CONVERT = "data_prep/convert_owt.py"


def read_data(config: ShardsConfig) -> Meta:
    """What a run reads: `meta.json` of its folder, or what its streams hold together.

    Raises:
        UserError: see :func:`read_meta`; streams that do not fit together, or whose weights make no sense.
    """
    check_streams(config)
    if not config.streams:
        return read_meta(config.path, config.remote, config.download_timeout)
    metas = {}
    for name, stream in config.streams.items():
        try:
            metas[name] = read_meta(stream.path, stream.remote, config.download_timeout)
        except UserError as error:
            raise UserError(f"data.streams.{name}: {error}") from error
    return mix(metas)


def read_meta(path: str, remote: str | None = None, timeout: float = 60.0) -> Meta:
    """`meta.json` of a folder of shards. A remote's is fetched first, with the tokenizer, by one process of a node.

    Args:
        timeout: seconds to fetch a file of a remote, at most
            :data:`electra_composer.storage.object_store.START_SECONDS`.

    Raises:
        UserError: no shards there, or not ones that this program can read; a remote that does not give them.
    """
    file_name = os.path.join(path, META)
    if remote is not None and os.path.abspath(remote) == os.path.abspath(path):
        raise UserError(f"{remote} is given as remote and as path; the latter is its cache, and must be another folder")
    if remote is not None and not os.path.isfile(file_name):
        if World.detect().is_local_leader:
            fetch_meta(path, remote, timeout)
        else:
            wait_for_leader(file_name, remote)
    if not os.path.isfile(file_name):
        found = "is no folder of shards" if os.path.isdir(path) else "does not exist"
        raise UserError(f"{path} {found} (no {META}); make it with: python {CONVERT} --out {path}")
    try:
        with open(file_name, encoding="utf-8") as file:
            return Meta.from_json(file.read(), path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file_name}: not readable as the description of shards: {error}; make them anew") from error


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


def check_split(config: ShardsConfig, meta: Meta, split: str, evaluation: bool = False) -> None:
    """Refuse a split that is empty, or whose local files are not those that its index lists, whole.

    Only names and sizes are compared: reading every shard to hash it would take minutes on a large corpus.

    Raises:
        UserError: naming the file, or the splits there are.
    """
    for folder in folders_of(config, meta, evaluation):
        _check_folder(folder, split, evaluation)


def _check_folder(folder: Folder, split: str, evaluation: bool) -> None:
    counts = folder.meta.splits
    if split not in counts or not counts[split].rows:
        present = ", ".join(name for name, of_split in counts.items() if of_split.rows)
        raise UserError(
            f"{folder.label}: no rows in split {split!r} (there are: {present}); convert with another --val-fraction"
            + (", or name the other streams in data.eval_streams" if evaluation and folder.name else "")
        )
    if folder.remote is not None:
        return  # what is not here yet, Streaming fetches and checks by its hash
    path = os.path.join(folder.path, split)
    index = os.path.join(path, "index.json")
    try:
        with open(index, encoding="utf-8") as file:
            shards = json.load(file)["shards"]
        check_names(path, [form["basename"] for shard in shards for form in _forms(shard)])
        rows = sum(shard["samples"] for shard in shards)
        broken = [message for shard in shards if (message := _broken_shard(path, shard))]
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: not a readable index of shards ({error}); make them anew with {CONVERT}") from error
    if broken:
        raise UserError(f"{broken[0]}; copy the shards again, or make them anew with {CONVERT}")
    if rows != counts[split].rows:
        raise UserError(f"{index} lists {rows:,} rows, but {META} {counts[split].rows:,}; make the shards anew")


def check_names(path: str, names: Iterable[str]) -> None:
    """Refuse an index whose files are not below its own folder: it would have others read, fetched over or removed.

    A folder inside is fine: `00003/shard.00000.mds`.

    Raises:
        UserError: naming the file.
    """
    for name in names:
        if not is_inside(name):
            raise UserError(
                f"{path}: the index of its shards names {name!r}, which is outside of the folder; such shards were not "
                "made by convert_owt.py, and are not read"
            )


def _forms(shard: dict[str, Any]) -> list[dict[str, Any]]:
    """A shard's files: as it is, and compressed."""
    return [form for form in (shard["raw_data"], shard["zip_data"]) if form is not None]


def _broken_shard(folder: str, shard: dict[str, Any]) -> str | None:
    """What is wrong with a shard's file; either of its forms, compressed or not, is enough."""
    forms = _forms(shard)
    if any(_size(os.path.join(folder, form["basename"])) == form["bytes"] for form in forms):
        return None
    name = os.path.join(folder, forms[-1]["basename"])
    size = _size(name)
    return f"{name} " + ("is missing" if size is None else f"has {size:,} bytes instead of {forms[-1]['bytes']:,}")


def _size(path: str) -> int | None:
    return os.path.getsize(path) if os.path.isfile(path) else None


def build_dataloader(
    config: ShardsConfig,
    meta: Meta,
    split: str,
    batch_size: int,
    *,
    shuffle: bool,
    drop_last: bool,
    seed: int,
    evaluation: bool = False,
) -> RowLoader:
    """A loader of batches whose state resumes in the middle of an epoch. Build it after `torch.distributed` is set up.

    Args:
        config: paths and number of workers.
        meta: of these shards, from :func:`read_data`.
        split: such as `train`.
        batch_size: rows per device.
        shuffle: a new order each epoch.
        drop_last: leave out a last batch that is not full, so that all have one shape.
        seed: of the order.
        evaluation: every row of every stream (or of `config.eval_streams`) once, whatever their weights.

    Raises:
        UserError: split missing or incomplete, or too small for one batch per device.
    """
    check_split(config, meta, split, evaluation)
    if batch_size < 1:
        raise UserError(f"the batch size per device is {batch_size}; expected at least 1")
    if config.download_attempts < 1:
        raise UserError(f"data.download_attempts is {config.download_attempts}; expected at least 1")
    folders = folders_of(config, meta, evaluation)
    epoch_size = None if evaluation else epoch_rows_wanted(config)
    method = "random" if evaluation else config.batching_method
    shares = weigh(folders, split, epoch_size, seed)
    world = World.detect()
    rows, ranks = sum(share.rows for share in shares), world.num_ranks
    if drop_last and rows < batch_size * ranks:
        raise UserError(
            f"{', '.join(folder.path for folder in folders)}: split {split!r} has {rows:,} rows, fewer than "
            f"one batch of {batch_size:,} rows on each of {ranks} device{'s' if ranks > 1 else ''} "
            f"({batch_size * ranks:,}); take a smaller batch size or more text"
        )
    batches = batches_per_epoch(shares, method, batch_size, world)
    full_batches = drop_last and method == "random"
    dataset = _build_dataset(config, folders, split, batch_size, shuffle, seed, meta, epoch_size, method, full_batches)
    if batches is not None:
        dataset.length = batches * batch_size
    # A remote's index is here only now; none of its shards is yet.
    files = [file for shard in dataset.shards for file in (shard.raw_data, shard.zip_data) if file is not None]
    check_names(", ".join(folder.label for folder in folders), [file.basename for file in files])
    return RowLoader(
        dataset,
        batch_size=batch_size,
        persistent_workers=config.num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        drop_last=drop_last,
        collate_fn=dataset.collate,
        **loader_workers(config.num_workers),
    )


def _build_dataset(
    config: ShardsConfig,
    folders: list[Folder],
    split: str,
    batch_size: int,
    shuffle: bool,
    seed: int,
    meta: Meta,
    epoch_size: int | None,
    method: str,
    full_batches: bool,
) -> RowDataset:
    streams: list[Stream] = []
    try:
        for folder in folders:
            streams.append(stream_of(folder, split))
        dataset = RowDataset(
            streams,
            config,
            batch_size,
            shuffle,
            seed,
            meta.max_seq_length,
            meta.tokenizer.special_ids["pad"],
            epoch_size,
            method,
            full_batches,
        )
    except Exception as error:  # every storage client has errors of its own
        remote = next((folder.remote for folder in folders if folder.remote is not None), None)
        reason = error if remote is None else explain(error, remote)
        raise UserError(
            f"{', '.join(folder.label for folder in folders)}: the shards of split {split!r} cannot be opened: {reason}"
        ) from error
    for folder, rows in zip(folders, dataset.samples_per_stream.tolist(), strict=True):
        if rows != folder.meta.splits[split].rows:  # of a remote, whose index has only now been read
            raise UserError(
                f"{folder.label}: the index of split {split!r} lists {rows:,} rows, but {META} "
                f"{folder.meta.splits[split].rows:,}; empty the cache, copy the shards again, or make them anew"
            )
    return dataset


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

    Training reads `config.train_split` of all streams by their weights, shuffled if `config.shuffle`, in full batches
    only. Evaluation reads every row of `config.eval_split` once, in its order, of one stream after another
    (`config.eval_streams`); its last batch may be smaller.

    Args:
        batch_size: rows per device.
        meta: of :func:`read_data`.
        batch_transforms: applied to each batch on the CPU, before it is split into microbatches.
        microbatch_transforms: applied to each microbatch once it is on the device.

    Raises:
        UserError: see :func:`build_dataloader`.
    """
    train = purpose == "train"
    split = config.train_split if train else config.eval_split
    loader = build_dataloader(
        config,
        meta,
        split,
        batch_size,
        shuffle=train and config.shuffle,
        drop_last=train,
        seed=seed,
        evaluation=not train,
    )
    rows, tokens = _size_of_epoch(config, meta, split, seed, train)
    return DataSpec(
        loader,
        num_samples=rows,
        num_tokens=tokens,
        batch_transforms=batch_transforms,
        microbatch_transforms=microbatch_transforms,
        get_num_samples_in_batch=_num_rows,
        get_num_tokens_in_batch=_num_tokens,
    )


def _size_of_epoch(config: ShardsConfig, meta: Meta, split: str, seed: int, train: bool) -> tuple[int, int]:
    """Rows and tokens of an epoch; the latter are expected ones where not every row is taken equally often."""
    folders = folders_of(config, meta, evaluation=not train)
    shares = weigh(folders, split, epoch_rows_wanted(config) if train else None, seed)
    counts = [folder.meta.splits[split] for folder in folders]
    tokens = sum(share.rows * of.tokens / of.rows for share, of in zip(shares, counts, strict=True))
    return sum(share.rows for share in shares), round(tokens)


def describe_streams(config: ShardsConfig, meta: Meta, seed: int) -> str | None:
    """What the streams' weights mean in rows of an epoch, for people; None without streams."""
    if not config.streams:
        return None
    folders = folders_of(config, meta)
    shares = weigh(folders, config.train_split, epoch_rows_wanted(config), seed)
    return describe_epoch(folders, config.train_split, shares)


def _num_rows(batch: Batch) -> int:
    return len(batch["input_ids"])


def _num_tokens(batch: Batch) -> int:
    return int(batch["num_tokens"])
