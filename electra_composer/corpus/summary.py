"""Counts of a finished conversion, by split and by source."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from electra_composer.atomic_files import write_file
from electra_composer.corpus.sources import Sources
from electra_composer.errors import UserError
from electra_composer.storage.shard_folder import SourceCounts, SplitCounts

Counts = TypeVar("Counts", SplitCounts, SourceCounts)


@dataclass
class Summary:
    """Result of a conversion."""

    out: str
    splits: dict[str, SplitCounts]
    sources: dict[str, SourceCounts]  # by name
    unreadable: list[str]  # error messages of files left out
    max_seq_length: int
    shard_bytes: int
    seconds: float  # of this run
    continued_tokens: int = 0  # tokens of the total that an interrupted run had converted
    was_complete: bool = False  # an earlier run had finished the conversion
    filled_split: str | None = None  # it would have been empty, and got one document

    @property
    def total(self) -> SplitCounts:
        return _sum(SplitCounts, map(asdict, self.splits.values()))

    @property
    def text(self) -> SourceCounts:
        """Counts of all sources together."""
        return _sum(SourceCounts, map(asdict, self.sources.values()))

    @property
    def dropped_share(self) -> float:
        """Fraction of all tokens that were dropped at the ends of segments."""
        total = self.total
        return total.dropped_tokens / max(1, total.tokens + total.dropped_tokens)

    @property
    def tokens_per_second(self) -> float:
        return (self.total.tokens - self.continued_tokens) / self.seconds

    def to_dict(self) -> dict[str, object]:
        return {
            **asdict(self),
            "text_bytes": self.text.text_bytes,
            "fill": self.total.fill(self.max_seq_length),
            "dropped_share": self.dropped_share,
            "tokens_per_second": self.tokens_per_second,
        }

    def __str__(self) -> str:
        lines = [f"{'':12}{'documents':>12}{'examples':>12}{'rows':>12}{'tokens':>15}{'fill':>8}{'dropped tokens':>16}"]
        for name, counts in [*self.splits.items(), ("total", self.total)]:
            lines.append(
                f"{name:12}{counts.documents:12,}{counts.examples:12,}{counts.rows:12,}{counts.tokens:15,}"
                f"{counts.fill(self.max_seq_length):8.2%}{counts.dropped_tokens:16,}"
            )
        if len(self.sources) > 1:
            width = max(map(len, self.sources))
            lines += ["", f"{'source':{width}}{'documents':>12}{'bytes of text':>17}{'tokens':>15}{'share':>8}"]
            for name, part in self.sources.items():
                share = part.tokens / max(1, self.text.tokens)
                lines.append(f"{name:{width}}{part.documents:12,}{part.text_bytes:17,}{part.tokens:15,}{share:8.1%}")
        lines.append(
            f"dropped at the ends of segments: {self.total.dropped_tokens:,} tokens, {self.dropped_share:.2%} of all"
        )
        resumed = f" ({self.continued_tokens:,} tokens came from an interrupted run)" if self.continued_tokens else ""
        if self.was_complete:
            lines.append(
                f"{self.out} is complete already (same options and sources); pass --overwrite to convert again"
            )
            return "\n".join(lines)
        lines.append(
            f"{self.text.text_bytes:,} bytes of text to {self.shard_bytes:,} bytes in {self.out}: "
            f"{self.seconds:.1f} s, {self.tokens_per_second:,.0f} tokens/s{resumed}"
        )
        return "\n".join(lines)


def total_counts(
    records: dict[int, dict[str, Any]], splits: Iterable[str], sources: Sources
) -> tuple[dict[str, SplitCounts], dict[str, SourceCounts], list[str]]:
    """Add up the records of all parts: counts by split, counts by source, error messages of unreadable files."""
    split_counts = {name: _sum(SplitCounts, [record["splits"][name] for record in records.values()]) for name in splits}
    source_counts = [
        _sum(SourceCounts, [record["counts"] for record in records.values() if record["source"] == number])
        for number in range(len(sources.sources))
    ]
    unreadable: dict[str, str] = {}  # a file may be in several parts and their copies, and counts once
    for number in sorted(records):
        for path, reason in records[number]["unreadable"].items():
            if path not in unreadable:
                unreadable[path] = reason
                source_counts[records[number]["source"]].unreadable_files += 1
    labels = [source.label for source in sources.sources]
    return split_counts, dict(zip(labels, source_counts, strict=True)), list(unreadable.values())


def _sum(kind: type[Counts], parts: Iterable[dict[str, int]]) -> Counts:
    total = dict.fromkeys((part.name for part in fields(kind)), 0)
    for part in parts:
        for name, value in part.items():
            total[name] += value
    return kind(**total)


def check_json_file(path: str) -> None:
    """Check that a file for :func:`write_json` can be written.

    Raises:
        UserError: it cannot.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise UserError(f"--json {path}: no such folder; create it, or choose another file")
    if os.path.isdir(path) or not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UserError(f"--json {path}: cannot be written; choose another file")


def write_json(path: str, content: dict[str, Any], out: str | None) -> None:
    """Write a summary or an estimate.

    Args:
        out: folder of the shards, if they are complete.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        write_file(path, json.dumps(content, indent=2))
    except OSError as error:
        written = f"; the shards in {out} are complete" if out is not None else ""
        raise UserError(f"--json {path}: {error.strerror}{written}") from error
