"""Keep the validation split and the training split of a small corpus from being empty.

A document is in the validation split if its hash, a number in [0, 1), is below `val_fraction`. Where that leaves a
split empty, the limit moves to the next document: the one with the lowest hash is taken for validation, or the one with
the highest for training. This does not depend on the order of documents, parts or processes, and changes no split that
is not empty. The record of each part tells the lowest and highest hash of its documents, and the limit that it used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from electra_composer.errors import UserError

UNKNOWN = (0.0, 1.0)  # hashes of a part that an earlier version converted: no split counts as empty


def extremes(hashes: list[float]) -> list[float]:
    """Return the lowest and the highest of the hashes; nothing if there are none."""
    return [min(hashes), max(hashes)] if hashes else []


def split_limit(records: Iterable[dict[str, Any]], val_fraction: float) -> float:
    """Return the limit below which a hash is in the validation split: `val_fraction`, unless it leaves a split empty.

    Args:
        records: of all parts.

    Raises:
        UserError: all documents are copies of one text, which cannot be in both splits.
    """
    hashes = extremes([value for record in records for value in record.get("split_hashes", UNKNOWN)])
    if not val_fraction or not hashes or hashes[0] < val_fraction <= hashes[1]:
        return val_fraction
    lowest, highest = hashes
    if lowest == highest:
        raise UserError(
            "the sources have only one document (or copies of one), which cannot be in both splits: pass "
            "--val-fraction 0 for no validation split, or divide the text into documents (.txt: by blank lines, or by "
            "--txt-documents 100 after every 100 lines)"
        )
    return math.nextafter(lowest, 1) if lowest >= val_fraction else highest


def changes(record: dict[str, Any], limit: float) -> bool:
    """Return whether a part was converted with another limit, and this one gives it other documents in a split."""
    used = record.get("val_fraction", limit)
    if limit < used:
        return True  # copies of a source leave out documents of validation, of which their records do not tell
    return any(used <= value < limit for value in record.get("split_hashes", UNKNOWN))
