"""Open the shards of a run: their metadata, a data loader, and Composer's `DataSpec`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

import psutil
from composer.core import DataSpec
from streaming.base.world import World

from electra_composer.batches.checks import check_index, check_split
from electra_composer.batches.collation import Batch, batch_bytes, split_batch
from electra_composer.batches.row_dataset import RowDataset
from electra_composer.batches.row_loader import RowLoader
from electra_composer.batches.streams import (
    Folder,
    Share,
    batches_per_epoch,
    check_streams,
    epoch_rows_wanted,
    merge_meta,
    plan_epoch,
)
from electra_composer.batches.workers import loader_workers
from electra_composer.config import ShardsConfig
from electra_composer.errors import UserError
from electra_composer.storage.object_store import explain, fetch_meta, wait_for_leader
from electra_composer.storage.shard_folder import CONVERTER, META, Meta, read_description


def read_data(config: ShardsConfig) -> Meta:
    """Read the metadata of a run's data: `meta.json` of its folder, or those of its streams, merged.

    Raises:
        UserError: see :func:`read_meta`; streams that do not fit together, or invalid weights.
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
    return merge_meta(metas)


def read_meta(path: str, remote: str | None = None, timeout: float = 60.0) -> Meta:
    """Read `meta.json` of a folder of shards. One rank per node first fetches it and the tokenizer from a remote.

    Args:
        timeout: seconds to fetch a file of a remote, at most
            :data:`electra_composer.storage.object_store.START_SECONDS`.

    Raises:
        UserError: there are no shards, or not ones that this version can read; or the remote does not serve them.
    """
    file_name = os.path.join(path, META)
    if remote is not None and os.path.abspath(remote) == os.path.abspath(path):
        raise UserError(f"{remote} is given as remote and as path; path is its cache, and must be another folder")
    if remote is not None and not os.path.isfile(file_name):
        if World.detect().is_local_leader:
            fetch_meta(path, remote, timeout)
        else:
            wait_for_leader(file_name, remote)
    if not os.path.isfile(file_name):
        found = "is not a folder of shards" if os.path.isdir(path) else "does not exist"
        raise UserError(f"{path} {found} (no {META}); create it with: python {CONVERTER} --out {path}")
    return read_description(file_name, lambda text: Meta.from_json(text, path), "the metadata of shards")


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
    transform: Callable[[Batch], Batch] | None = None,
    pin_memory: bool = False,
) -> RowLoader:
    """Build a loader whose state resumes in the middle of an epoch. Call it after `torch.distributed` is initialised.

    Args:
        meta: of these shards, from :func:`read_data`.
        batch_size: rows per device.
        shuffle, seed: use a new order in each epoch, derived from the seed.
        drop_last: drop a last batch that is not full, so that all have one shape.
        evaluation: read every row of every stream (or of `config.eval_streams`) once, ignoring their weights.
        transform: of :class:`RowLoader`, where batches come from a thread.
        pin_memory: whether the run's device is a GPU, which copies from pinned memory without waiting.

    Raises:
        UserError: the split is missing or incomplete, or too small for one batch per device.
    """
    check_split(config, meta, split, evaluation)
    shares = plan_epoch(config, meta, split, seed, evaluation)
    folders = [share.folder for share in shares]
    _check_sizes(shares, split, batch_size, World.detect().num_ranks, drop_last)
    _check_order(config, shares, shuffle)
    method = "random" if evaluation else config.batching_method
    batches = batches_per_epoch(shares, method, batch_size, World.detect())
    try:
        dataset = RowDataset(
            [folder.open(split) for folder in folders],
            config,
            meta,
            full_batches=drop_last and method == "random",
            batch_size=batch_size,
            shuffle=shuffle,
            shuffle_seed=seed,
            epoch_size=None if evaluation else epoch_rows_wanted(config),
            batching_method=method,
        )
    except Exception as error:  # each storage client raises its own types
        raise _not_opened(folders, split, error) from error
    check_index(dataset, folders, split)
    dataset.length = dataset.length if batches is None else batches * batch_size
    workers, in_thread = choose_workers(config.num_workers, dataset)
    return RowLoader(
        dataset,
        background=in_thread,
        transform=transform if in_thread else None,
        batch_size=batch_size,
        pin_memory=pin_memory,
        drop_last=drop_last,
        **loader_workers(workers, dataset.collate, batch_bytes(batch_size, meta.max_seq_length)),
    )


def _not_opened(folders: list[Folder], split: str, error: Exception) -> UserError:
    remote = next((folder.remote for folder in folders if folder.remote is not None), None)
    reason = error if remote is None else explain(error, remote)
    names = ", ".join(folder.label for folder in folders)
    return UserError(f"{names}: the shards of split {split!r} cannot be opened: {reason}")


BYTES_PER_ROW = 32
"""Main memory for the order of an epoch: four arrays of int64 at the same time."""

WORKERS = 2
"""Processes of `data.num_workers: auto` where shards are fetched or decompressed, which a thread would do in turn with
the training step."""


def choose_workers(num_workers: int | str, dataset: RowDataset) -> tuple[int, bool]:
    """Resolve `data.num_workers`.

    Returns:
        The number of processes, and whether to load in a thread of this process instead.
    """
    if isinstance(num_workers, int):
        return num_workers, False
    remote = any(stream.remote is not None for stream in dataset.streams)
    compressed = any(shard.zip_data is not None for shard in dataset.shards)
    return (WORKERS, False) if remote or compressed else (0, True)


def _check_sizes(shares: list[Share], split: str, batch_size: int, ranks: int, drop_last: bool) -> None:
    rows = sum(share.rows for share in shares)
    if drop_last and rows < batch_size * ranks:
        raise UserError(
            f"{', '.join(share.folder.path for share in shares)}: split {split!r} has {rows:,} rows, fewer than one "
            f"batch of {batch_size:,} rows on each of {ranks} devices ({batch_size * ranks:,}); use a smaller batch "
            "size or more text"
        )


# Workaround (streaming 0.13): the order of an epoch is computed when its first batch is read: too many rows end in
# a MemoryError, too few for num_canonical_nodes in a ValueError; goes when StreamingDataset checks its arguments.
def _check_order(config: ShardsConfig, shares: list[Share], shuffle: bool) -> None:
    rows = [share.rows for share in shares]
    total, memory = sum(rows), psutil.virtual_memory().total
    if total * BYTES_PER_ROW > memory:
        raise UserError(
            f"an epoch takes {total:,} rows, whose order needs {total * BYTES_PER_ROW / 1e9:,.0f} GB of the "
            f"{memory / 1e9:,.0f} GB of main memory; set a smaller data.epoch_size, or repeat or choose of the streams"
        )
    fewest = total if config.batching_method == "random" else min(rows)
    if shuffle and config.num_canonical_nodes is not None and config.num_canonical_nodes > fewest:
        raise UserError(
            f"data.num_canonical_nodes is {config.num_canonical_nodes}; expected at most {fewest:,}, the rows of an "
            f"epoch{'' if config.batching_method == 'random' else ' of the smallest stream'}"
        )


def build_data_spec(
    config: ShardsConfig,
    purpose: Literal["train", "eval"],
    batch_size: int,
    meta: Meta,
    seed: int,
    batch_transforms: Callable[[Batch], Batch] | None = None,
    pin_memory: bool = False,
) -> DataSpec:
    """Build Composer's DataSpec for training or evaluation: samples are rows, tokens exclude padding.

    Training reads `config.train_split` of all streams according to their weights, shuffled if `config.shuffle`, and
    drops a partial batch. Evaluation reads every row of `config.eval_split` once, in order, one stream after another
    (`config.eval_streams`); its last batch may be smaller.

    Args:
        batch_size: rows per device.
        meta: from :func:`read_data`.
        batch_transforms: applied to each batch on the CPU, before it is split into microbatches.
        pin_memory: whether the run's device is a GPU.

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
        # With several ranks it may talk to the others, which a thread must not do at the same time as the step.
        transform=batch_transforms if World.detect().num_ranks == 1 else None,
        pin_memory=pin_memory,
    )
    if loader.transform is not None:
        batch_transforms = None
    shares = plan_epoch(config, meta, split, seed, evaluation=not train)
    counts = [share.folder.meta.splits[split] for share in shares]
    return DataSpec(
        loader,
        num_samples=sum(share.rows for share in shares),
        # The expected number, if rows are not all taken equally often.
        num_tokens=round(sum(share.rows * of.tokens / of.rows for share, of in zip(shares, counts, strict=True))),
        batch_transforms=batch_transforms,
        split_batch=split_batch,
        get_num_samples_in_batch=lambda batch: len(batch["input_ids"]),
        get_num_tokens_in_batch=lambda batch: int(batch["num_tokens"]),
    )
