"""Several folders of shards read as one: what they must have in common, and how much of each an epoch takes.

The rules of `proportion`, `repeat`, `choose` and `epoch_size` are Streaming's (`Stream.apply_weights`), and so is how
rows are picked and put in batches (`streaming/base/sampling.py`, `batching/`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from streaming import Stream
from streaming.base.util import number_abbrev_to_int
from streaming.base.world import World

from electra_composer.config import ShardsConfig, StreamConfig
from electra_composer.config_loading import nearest
from electra_composer.errors import UserError
from electra_composer.storage.shard_folder import Meta, SplitCounts

WEIGHTS = ("proportion", "repeat", "choose")


@dataclass
class MixedMeta(Meta):
    """What several folders hold together: the first one's meta, with the counts of all."""

    streams: dict[str, Meta] = field(default_factory=dict)


class Folder(NamedTuple):
    """A folder of shards, and how much of it is in an epoch."""

    name: str  # of the stream; empty for data.path
    path: str
    remote: str | None
    meta: Meta
    weight: dict[str, float]  # one of WEIGHTS, as Streaming's `Stream` takes it; or none

    @property
    def label(self) -> str:
        """How an error message names it."""
        return f"data.streams.{self.name} ({self.path})" if self.name else self.path


def folders_of(config: ShardsConfig, meta: Meta, evaluation: bool = False) -> list[Folder]:
    """The folders that are read, in the order of the configuration.

    Args:
        meta: of :func:`electra_composer.batches.shards.read_data`.
        evaluation: those of `eval_streams`, every row once.
    """
    if not config.streams:
        return [Folder("", config.path, config.remote, meta, {})]
    assert isinstance(meta, MixedMeta), "streams have a meta of their own: read_data"
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
    """Refuse what cannot be mixed, before anything is read.

    Raises:
        UserError: with the full path of the key.
    """
    if not config.streams:
        for key in ("eval_streams", "batching_method"):
            if getattr(config, key) not in (None, "random"):
                raise UserError(f"data.{key} is {getattr(config, key)}, but there are no data.streams")
    epoch_rows_wanted(config)
    places: dict[str, str] = {}
    weights = {name: _weight(stream) for name, stream in config.streams.items()}
    for name, stream in config.streams.items():
        other = places.setdefault(os.path.abspath(stream.path), name)
        if other != name:
            raise UserError(
                f"data.streams.{other} and data.streams.{name} are the same folder, {stream.path}; give it once, with "
                "repeat: 2 to take its rows twice"
            )
        _check_weight(name, weights[name])
    proportional = [name for name, weight in weights.items() if "proportion" in weight]
    if proportional and len(proportional) < len(weights):
        other = next(name for name in weights if name not in proportional)
        raise UserError(
            f"data.streams.{proportional[0]} has a proportion, but data.streams.{other} has "
            f"{next(iter(weights[other]), 'none')}; give all streams a proportion, or none"
        )
    if config.epoch_size is not None and not proportional and any(weights.values()):
        raise UserError(
            "data.epoch_size goes with proportions, or with streams that say nothing; repeat and choose give the size "
            "of an epoch themselves"
        )
    if config.eval_streams is not None:
        _check_eval_streams(config.eval_streams, list(config.streams))


def _check_eval_streams(chosen: list[str], streams: list[str]) -> None:
    for name in chosen:
        if name not in streams:
            raise UserError(f"data.eval_streams: no stream {name}; {nearest(name, streams)}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise UserError(f"data.eval_streams is {chosen}; expected names of streams, each once, or null for all")


def _check_weight(name: str, weight: dict[str, float]) -> None:
    if len(weight) > 1:
        raise UserError(f"data.streams.{name} has {' and '.join(weight)}; give one of them")
    for key, value in weight.items():
        if not (0 < value < float("inf")):
            raise UserError(f"data.streams.{name}.{key} is {value}; expected more than 0, or leave the stream out")


def epoch_rows_wanted(config: ShardsConfig) -> int | None:
    """`data.epoch_size` as a number of rows, if it is given."""
    if config.epoch_size is None:
        return None
    try:
        rows = number_abbrev_to_int(config.epoch_size)
    except ValueError as error:
        raise UserError(f"data.epoch_size is {config.epoch_size!r}; expected rows, such as 500000 or 10m") from error
    if rows < 1:
        raise UserError(f"data.epoch_size is {config.epoch_size}; expected at least 1 row")
    return rows


def mix(metas: dict[str, Meta]) -> MixedMeta:
    """The common description of several streams.

    Raises:
        UserError: other tokenizers or lengths, with both streams and both values.
    """
    (first_name, first), *others = metas.items()
    for name, meta in others:
        differences = (
            (
                "the tokenizer",
                lambda meta: (meta.tokenizer.vocabulary_sha256, meta.tokenizer.special_ids),
                lambda meta: (
                    f"{meta.tokenizer.name} ({meta.tokenizer.vocab_size:,} entries, SHA-256 "
                    f"{meta.tokenizer.vocabulary_sha256[:8]}…, special ids {meta.tokenizer.special_ids})"
                ),
                "with the same --tokenizer",
            ),
            (
                "rows of",
                lambda meta: meta.max_seq_length,
                lambda meta: f"{meta.max_seq_length} tokens",
                "with the same --max-seq-length",
            ),
        )
        for what, value, told, mend in differences:
            if value(meta) != value(first):
                raise UserError(
                    f"data.streams.{first_name} has {what} {told(first)}, data.streams.{name} {told(meta)}; convert "
                    f"one of them anew, {mend}"
                )
    splits = sorted({split for meta in metas.values() for split in meta.splits})
    return MixedMeta(
        first.tokenizer,
        first.max_seq_length,
        first.packing,
        first.seed,
        first.conversion,
        {split: _sum([meta.splits.get(split, SplitCounts()) for meta in metas.values()]) for split in splits},
        folder=first.folder,
        streams=metas,
    )


def _sum(counts: Sequence[SplitCounts]) -> SplitCounts:
    columns = zip(*(vars(part).values() for part in counts), strict=True)
    return SplitCounts(*(sum(column) for column in columns))


class Share(NamedTuple):
    """What an epoch takes of a folder."""

    rows: int
    proportion: float  # of the epoch, and of a stratified batch


def weigh(folders: Sequence[Folder], split: str, epoch_size: int | None, seed: int) -> list[Share]:
    """How much of each folder is in an epoch, by Streaming's own rule.

    Args:
        epoch_size: rows of all together; None: as many as they hold, or as repeat and choose say.
        seed: of the order; it decides which streams have one row more where proportions leave a fraction.

    Raises:
        UserError: a stream of which no row would be taken.
    """
    streams = [Stream(local=folder.path, **folder.weight) for folder in folders]
    rows = np.array([folder.meta.splits[split].rows for folder in folders], np.int64)
    Stream.apply_weights(streams, rows, epoch_size, seed)
    shares = [Share(int(stream.choose), float(stream.proportion)) for stream in streams]
    for folder, share in zip(folders, shares, strict=True):
        if share.rows < 1:
            raise UserError(f"{folder.label}: an epoch would take none of its rows; give it more, or leave it out")
    return shares


def batches_per_epoch(shares: Sequence[Share], method: str, batch_size: int, world: World) -> int | None:
    """How many batches per device `stratified` and `per_stream` give, which leave out what does not fill one.

    Args:
        batch_size: rows per device.

    Returns:
        None for `random`, where it follows from the rows alone.

    Raises:
        UserError: a stream that has too few rows for one batch, or too small a share for a row in each.
    """
    global_size = batch_size * world.num_ranks
    if method == "random":
        return None
    rows = [_round_up(share.rows, world.num_nodes) for share in shares]  # Streaming repeats some for even shares
    if method == "per_stream":
        batches = [-(-count // world.num_ranks) // batch_size for count in rows]
        if min(batches) < 1:
            raise UserError(
                f"data.batching_method is per_stream, but a stream gives only {min(rows):,} rows an epoch, fewer than "
                f"a batch of {global_size:,}; take a smaller batch size, or random"
            )
        return sum(batches)
    portions = stratified_portions(shares, global_size)
    if min(portions) < 1:
        raise UserError(
            f"data.batching_method is stratified, but a stream has {min(share.proportion for share in shares):.2%} of "
            f"the rows, which is none in a batch of {global_size:,}; take a larger batch size, or random"
        )
    padded = [_round_up(count, world.ranks_per_node) for count in rows]
    return min(count // portion for count, portion in zip(padded, portions, strict=True))


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def stratified_portions(shares: Sequence[Share], global_size: int) -> list[int]:
    """Rows of each stream in every batch over all devices, as Streaming's `batching/stratified.py` deals them."""
    exact = global_size * np.array([share.proportion for share in shares])
    portions = exact.astype(np.int64)
    portions[np.flip(np.argsort(exact - portions))[: global_size - portions.sum()]] += 1
    return [int(portion) for portion in portions]


def describe_epoch(folders: Sequence[Folder], split: str, shares: Sequence[Share]) -> str:
    """A table for people: what is there, and what an epoch takes of it."""
    width = max(len("stream"), *(len(folder.name) for folder in folders))
    lines = [f"{'stream':{width}} {'rows':>14} {'in an epoch':>14} {'share':>8} {'each taken':>12}"]
    total = sum(share.rows for share in shares)
    for folder, share in zip(folders, shares, strict=True):
        there = folder.meta.splits[split].rows
        lines.append(
            f"{folder.name:{width}} {there:14,} {share.rows:14,} {share.rows / total:8.2%} {share.rows / there:11.3g}×"
        )
    lines.append(f"{'all':{width}} {sum(folder.meta.splits[split].rows for folder in folders):14,} {total:14,}")
    return "\n".join(lines)
