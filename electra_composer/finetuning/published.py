"""Published GLUE scores of ELECTRA with their statistic and source.

All numbers were read at their source, or in a quotation of it that the source names.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

EXPECTED_RESULTS = "google-research/electra, README, expected results"
REPLICATED_RESULTS = "richarddwang/electra_pytorch, README, table 1"
SMALL, BASE, LARGE = 256, 768, 1024  # hidden sizes
# Order of the columns in both READMEs.
COLUMNS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")


@dataclass(frozen=True)
class Published:
    """A published row.

    Attributes:
        model: name given by its authors.
        statistic: statistic over the runs, in the source's words.
        split: `dev` or `test`; only `dev` compares with scores of finetuning.
        hidden_size: hidden size of the model; selects the rows for a table.
        source: where it was published, and where it was read if elsewhere.
        scores: task → score × 100; MNLI matched.
        average: over the eight tasks, if only that was published.
    """

    model: str
    statistic: str
    split: str
    hidden_size: int
    source: str
    scores: dict[str, float] = field(default_factory=dict)
    average: float | None = None


def _row(*scores: float) -> dict[str, float]:
    return dict(zip(COLUMNS, scores, strict=True))


PUBLISHED = (
    Published(
        "ELECTRA-Small-OWT",
        "median over many seeds",  # at least 10, of one pretrained checkpoint: issue 98 of the repository
        "dev",
        SMALL,
        EXPECTED_RESULTS,
        _row(56.8, 88.3, 87.4, 86.8, 88.3, 78.9, 87.9, 68.5),
    ),
    Published(
        "ELECTRA-Small-OWT (richarddwang)",
        "mean of 10",
        "dev",
        SMALL,
        REPLICATED_RESULTS,
        _row(58.72, 88.03, 86.04, 86.16, 88.63, 80.4, 87.45, 67.46),
    ),
    Published(
        "ELECTRA-Small (released: Small++)",
        "median over many seeds",
        "dev",
        SMALL,
        EXPECTED_RESULTS,
        _row(57.0, 91.2, 88.0, 87.5, 89.0, 81.3, 88.4, 66.7),
    ),
    Published(
        "ELECTRA-Small (paper)",
        "average only",
        "dev",
        SMALL,
        "arXiv 2003.10555, table 1, as quoted in PaddlePaddle/models, pull request 5051",
        average=79.9,
    ),
    Published(
        "ELECTRA-Small++ (paper)",
        "as published",
        "test",
        SMALL,
        "arXiv 2003.10555, table 8, as quoted in richarddwang/electra_pytorch, README, table 2",
        _row(55.6, 91.1, 84.9, 84.6, 88.0, 81.6, 88.3, 63.6),
    ),
    Published(
        "ELECTRA-Base (released)",
        "median over many seeds",
        "dev",
        BASE,
        EXPECTED_RESULTS,
        _row(67.7, 95.1, 89.5, 91.2, 91.5, 88.8, 93.2, 82.7),
    ),
    Published(
        "ELECTRA-Large (released)",
        "median over many seeds",
        "dev",
        LARGE,
        EXPECTED_RESULTS,
        _row(69.1, 96.9, 90.8, 92.6, 92.4, 90.9, 95.0, 88.0),
    ),
)

PUBLISHED_MODELS = {
    "source": "richarddwang/electra_pytorch, README, table 4",
    "mean": 81.38,
    "std": 0.57,
    "max": 82.23,
    "min": 80.42,
    "models": 14,
}
"""ELECTRA-Small pretrained with different seeds: average over the tasks of the best of 10 runs each."""


def published_rows(hidden_size: int | None) -> list[dict[str, Any]]:
    """Return the rows of models of a hidden size, or of ELECTRA-Small if there are none."""
    known = {row.hidden_size for row in PUBLISHED}
    wanted = hidden_size if hidden_size in known else SMALL
    return [dataclasses.asdict(row) for row in PUBLISHED if row.hidden_size == wanted]
