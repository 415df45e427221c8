"""Select the documents to convert where that depends on all parts: deduplication, and limits on the total.

The engine reads every part once before the conversion, and returns the size and a 64-bit hash of each document. Without
deduplication and limits nothing is read twice.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from electra_composer.atomic_files import write_file
from electra_composer.corpus.documents import ReadStats, limit_reached, part_documents
from electra_composer.corpus.source_parts import Part
from electra_composer.corpus.sources import Sources

FILE = "selection.npz"


class PartScan(NamedTuple):
    """Sizes and hashes of the documents of a part, in order."""

    sizes: NDArray[np.uint32]  # bytes
    digests: NDArray[np.uint64]


class Selection(NamedTuple):
    """Documents of a part to convert."""

    chosen: NDArray[np.bool_] | None  # [documents]; None: all
    duplicates: int = 0  # left out as copies of earlier documents

    @property
    def is_empty(self) -> bool:
        return self.chosen is not None and not self.chosen.any()


def scan_part(sources: Sources, part: Part) -> PartScan:
    """Read a part; without deduplication, no more of it than a limit on the total could need."""
    sizes: list[int] = []
    digests: list[int] = []
    total = 0
    for document in part_documents(part, sources, ReadStats()):
        if not sources.deduplicate and limit_reached(sources, len(sizes), total):
            break
        sizes.append(document.size)
        digests.append(document.digest)
        total += document.size
    return PartScan(np.array(sizes, np.uint32), np.array(digests, np.uint64))


def select(
    parts: list[Part], sources: Sources, scan: Callable[[Iterable[Part]], Iterator[PartScan]]
) -> list[Selection]:
    """Return the selection of each part: the first copy of each document, up to the limits.

    Args:
        parts: all parts of the sources, in order.
        scan: yields :func:`scan_part` of each part in order; consumed no further than the limits need.
    """
    if not sources.deduplicate and sources.max_documents is None and sources.max_bytes is None:
        return [Selection(None)] * len(parts)
    selections: list[Selection] = []
    seen = np.zeros(0, np.uint64)  # sorted
    documents = size = 0
    for sizes, digests in scan(parts):
        chosen = np.ones(len(sizes), np.bool_)
        if sources.deduplicate:
            chosen[:] = False
            chosen[np.unique(digests, return_index=True)[1]] = True  # first copies within the part
            chosen &= ~_is_in(digests, seen)
            seen = np.union1d(seen, digests[chosen])
        duplicates = int(len(chosen) - chosen.sum())
        places = np.flatnonzero(chosen)
        before = size + np.cumsum(sizes[places], dtype=np.int64) - sizes[places]  # bytes before each document
        enough = np.array([limit_reached(sources, documents + i, b) for i, b in enumerate(before.tolist())], np.bool_)
        chosen[places[enough]] = False
        documents += int(chosen.sum())
        size += int(sizes[chosen].sum())
        selections.append(Selection(chosen, duplicates))
        if limit_reached(sources, documents, size):
            break
    nothing = Selection(np.zeros(0, np.bool_))
    return selections + [nothing] * (len(parts) - len(selections))


def _is_in(values: NDArray[np.uint64], ordered: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Same as `np.isin`, but `ordered` is sorted already."""
    if not len(ordered):
        return np.zeros(len(values), np.bool_)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[places] == values


def save(folder: str, selections: list[Selection]) -> None:
    """Save selections atomically, for a resumed conversion."""
    arrays = {f"{index:06}": part.chosen for index, part in enumerate(selections) if part.chosen is not None}
    content = io.BytesIO()  # an archive on a full disk would raise a second error when it is deleted
    np.savez_compressed(
        content,
        allow_pickle=False,
        duplicates=np.array([part.duplicates for part in selections], np.int64),
        **arrays,
    )
    write_file(os.path.join(folder, FILE), content.getvalue())


def load(folder: str) -> list[Selection] | None:
    """Load saved selections; None if there are none."""
    path = os.path.join(folder, FILE)
    if not os.path.isfile(path):
        return None
    with np.load(path, allow_pickle=False) as arrays:
        return [
            Selection(arrays[name] if (name := f"{index:06}") in arrays else None, int(duplicates))
            for index, duplicates in enumerate(arrays["duplicates"])
        ]
