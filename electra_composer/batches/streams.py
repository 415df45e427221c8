"""Mixing of several folders of shards: requirements on them, and how many rows an epoch takes of each.

`proportion`, `repeat`, `choose` and `epoch_size` follow Streaming's rules (`Stream.apply_weights`), as do the choice
of rows and their batches (`streaming/base/sampling.py`, `batching/`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from streaming import Stream
from streaming.base.util import number_abbrev_to_int
from streaming.base.world import World

from electra_composer.batches.streaming_fixes import FolderStream, RemoteStream
from electra_composer.config import ShardsConfig, StreamConfig
from electra_composer.errors import UserError, nearest
from electra_composer.storage.shard_folder import Meta, SplitCounts
from electra_composer.word_limits import word_limit

WEIGHTS = ("proportion", "repeat", "choose")


@dataclass
class MixedMeta(Meta):
    """Metadata of several folders: that of the first, with the counts of all."""

    streams: dict[str, Meta] = field(default_factory=dict)


class Folder(NamedTuple):
    """A folder of shards and its weight in an epoch."""

    name: str  # of the stream; empty for data.path
    path: str
    remote: str | None
    meta: Meta
    weight: dict[str, float]  # at most one of WEIGHTS, as an argument of Streaming's `Stream`

    @property
    def label(self) -> str:
        """Name in error messages."""
        return f"data.streams.{self.name} ({self.path})" if self.name else self.path

    def open(self, split: str) -> Stream:
        """Return one split as a stream of :class:`FixedStreamingDataset`."""
        kind = FolderStream if self.remote is None else RemoteStream
        return kind(local=self.path, remote=self.remote, split=split, **self.weight)


def folders_of(config: ShardsConfig, meta: Meta, evaluation: bool = False) -> list[Folder]:
    """Return the folders to read, in the order of the configuration.

    Args:
        meta: from :func:`electra_composer.batches.shards.read_data`.
        evaluation: return those of `eval_streams`, without weights: every row once.
    """
    if not config.streams:
        return [Folder("", config.path, config.remote, meta, {})]
    assert isinstance(meta, MixedMeta), "metadata of streams comes from read_data"
    names = config.eval_streams if evaluation and config.eval_streams is not None else list(config.streams)
    folders = []
    for name in names:
        stream = config.streams[name]
        weight = {} if evaluation else _weight(stream)
        folders.append(Folder(name, stream.path, stream.remote, meta.streams[name], weight))
    return folders


def _weight(stream: StreamConfig) -> dict[str, float]:
    return {name: value for name in WEIGHTS if (value := getattr(stream, name)) is not None}


def check_streams(config: ShardsConfig) -> None:
    """Refuse streams that cannot be mixed, before any file is read.

    Raises:
        UserError: with the full path of the key.
    """
    if not config.streams:
        for key in ("eval_streams", "batching_method"):
            if getattr(config, key) not in (None, "random"):
                raise UserError(f"data.{key} is {getattr(config, key)}, but there are no data.streams; remove it")
    places: dict[str, str] = {}
    weights = {name: _weight(stream) for name, stream in config.streams.items()}
    for name, stream in config.streams.items():
        other = places.setdefault(os.path.abspath(stream.path), name)
        if other != name:
            raise UserError(
                f"data.streams.{other} and data.streams.{name} are the same folder, {stream.path}; list it once, with "
                "repeat: 2 to take its rows twice"
            )
        if len(weights[name]) > 1:
            raise UserError(f"data.streams.{name} has {' and '.join(weights[name])}; give one of them")
    proportional = [name for name, weight in weights.items() if "proportion" in weight]
    if proportional and len(proportional) < len(weights):
        other = next(name for name in weights if name not in proportional)
        raise UserError(
            f"data.streams.{proportional[0]} has a proportion, but data.streams.{other} has "
            f"{next(iter(weights[other]), 'none')}; give all streams a proportion, or none"
        )
    if config.epoch_size is not None and not proportional and any(weights.values()):
        raise UserError(
            "data.epoch_size cannot be combined with repeat or choose, which already determine the size of an epoch; "
            "give the streams proportions or no weights"
        )
    chosen = config.eval_streams
    for name in chosen or ():
        if name not in config.streams:
            raise UserError(f"data.eval_streams: no stream {name}; {nearest(name, list(config.streams))}")
    if chosen is not None and (not chosen or len(set(chosen)) < len(chosen)):
        raise UserError(f"data.eval_streams is {chosen}; expected names of streams, each once, or null for all")


def epoch_rows_wanted(config: ShardsConfig) -> int | None:
    """Return `data.epoch_size` as a number of rows, or None."""
    return None if config.epoch_size is None else number_abbrev_to_int(config.epoch_size)


def merge_meta(metas: dict[str, Meta]) -> MixedMeta:
    """Merge the metadata of several streams.

    Raises:
        UserError: their tokenizers or lengths differ; names both streams and both values.
    """
    (first_name, first), *others = metas.items()
    for name, meta in others:
        if meta.tokenizer.identity != first.tokenizer.identity:
            flag, tokenizers = "--tokenizer", (first.tokenizer, meta.tokenizer)
            found = [f"the tokenizer {of.label}, special ids {of.special_ids}" for of in tokenizers]
        elif meta.max_seq_length != first.max_seq_length:
            flag, found = "--max-seq-length", [f"rows of {of.max_seq_length} tokens" for of in (first, meta)]
        else:
            continue
        raise UserError(
            f"data.streams.{first_name} has {found[0]}, data.streams.{name} has {found[1]}; convert one of them again "
            f"with the same {flag}"
        )
    splits = sorted({split for meta in metas.values() for split in meta.splits})
    counts = {split: [meta.splits.get(split, SplitCounts()) for meta in metas.values()] for split in splits}
    columns = {split: zip(*map(dataclasses.astuple, parts), strict=True) for split, parts in counts.items()}
    sums = {split: SplitCounts(*map(sum, of_split)) for split, of_split in columns.items()}
    return MixedMeta(**{**vars(first), "splits": sums, "sources": {}}, streams=metas)


class Share(NamedTuple):
    """Part of an epoch that comes from one folder."""

    folder: Folder
    rows: int
    proportion: float  # of the epoch, and of a stratified batch


def plan_epoch(config: ShardsConfig, meta: Meta, split: str, seed: int, evaluation: bool = False) -> list[Share]:
    """Compute how many rows an epoch takes of each folder, using Streaming's own rule.

    Args:
        meta: from :func:`electra_composer.batches.shards.read_data`.
        seed: of the order; decides which streams get one row more where proportions leave a fraction.
        evaluation: take every row of `eval_streams` once.

    Raises:
        UserError: an epoch would take no row of a stream.
    """
    folders = folders_of(config, meta, evaluation)
    streams = [Stream(local=folder.path, **folder.weight) for folder in folders]
    rows = np.array([folder.meta.splits[split].rows for folder in folders], np.int64)
    Stream.apply_weights(streams, rows, None if evaluation else epoch_rows_wanted(config), seed)
    chosen = zip(folders, streams, strict=True)
    shares = [Share(folder, int(stream.choose), float(stream.proportion)) for folder, stream in chosen]
    for folder, count, _ in shares:
        if count < 1:
            raise UserError(f"{folder.label}: an epoch takes none of its rows; raise its weight, or remove the stream")
    return shares


# Workaround (streaming 0.13): StreamingDataset.__len__ counts the rows of an epoch, although stratified and per_stream
# batching drop rows that do not fill a batch. The number of batches is computed here as `batching/stratified.py` and
# `batching/per_stream.py` deal them; goes when __len__ follows the batching method.
def batches_per_epoch(shares: Sequence[Share], method: str, batch_size: int, world: World) -> int | None:
    """Return the number of batches per device with `stratified` or `per_stream` batching.

    Args:
        batch_size: rows per device.

    Returns:
        None for `random`, where it follows from the number of rows alone.

    Raises:
        UserError: a stream has too few rows for one batch, or too small a proportion for one row per batch.
    """
    global_size = batch_size * world.num_ranks
    if method == "random":
        return None
    rows = [_round_up(share.rows, world.num_nodes) for share in shares]  # Streaming repeats some for even partitions
    if method == "per_stream":
        batches = [-(-count // world.num_ranks) // batch_size for count in rows]
        if min(batches) < 1:
            raise UserError(
                f"data.batching_method is per_stream, but a stream has only {min(rows):,} rows per epoch, fewer than "
                f"a batch of {global_size:,}; use a smaller batch size, or random"
            )
        return sum(batches)
    # Largest remainders, as in Streaming's `batching/stratified.py`.
    exact = global_size * np.array([share.proportion for share in shares])
    portions = exact.astype(np.int64)
    portions[np.flip(np.argsort(exact - portions))[: global_size - portions.sum()]] += 1
    if min(portions) < 1:
        raise UserError(
            f"data.batching_method is stratified, but a stream has {min(share.proportion for share in shares):.2%} of "
            f"the rows, which is none in a batch of {global_size:,}; use a larger batch size, or random"
        )
    padded = np.array([_round_up(count, world.ranks_per_node) for count in rows])
    return int(min(padded // portions))


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def describe_streams(config: ShardsConfig, meta: Meta, seed: int) -> str | None:
    """Format a table of each stream's rows and of how many an epoch takes; None without streams.

    A last line says if their tokenizers differ in how long a word may be: those of older shards have 100 characters.
    """
    if not config.streams:
        return None
    shares = plan_epoch(config, meta, config.train_split, seed)
    width = max(len("stream"), *(len(share.folder.name) for share in shares))
    lines = [f"{'stream':{width}} {'rows':>14} {'in an epoch':>14} {'share':>8} {'each taken':>12}"]
    total = sum(share.rows for share in shares)
    for folder, rows, _ in shares:
        there = folder.meta.splits[config.train_split].rows
        lines.append(f"{folder.name:{width}} {there:14,} {rows:14,} {rows / total:8.2%} {rows / there:11.3g}×")
    lines.append(f"{'all':{width}} {meta.splits[config.train_split].rows:14,} {total:14,}")
    limits = {share.folder.name: word_limit(share.folder.meta.tokenizer_folder) for share in shares}
    if len(set(limits.values())) > 1:
        each = ", ".join(f"{limit} in {name}" for name, limit in limits.items())
        lines.append(f"a word with more characters is [UNK]: {each}; the same word may be pieces in one stream only")
    return "\n".join(lines)
