"""Benchmark of finetuning on other tasks: one line, both sides trained on the same rows."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from glue_tiny import write_source
from test_finetune import write_kind
from tiny import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))  # as when they run as scripts

import finetune as benchmark

from electra_composer.errors import UserError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="transformers' Trainer needs accelerate"
)


def test_one_line_for_each_kind_of_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of both are those of the same task; the untrained models of both give the same outputs."""
    monkeypatch.setattr(benchmark, "LENGTHS", dict.fromkeys(benchmark.LENGTHS, 24))
    words = ["--source", write_source(tmp_path / "source"), "--warmup", "2", "--batch", "8", "--device", "cpu"]
    for kind in benchmark.LENGTHS:
        files = [write_kind(tmp_path, kind, rows, name, rows) for rows, name in ((32, "train"), (12, "dev"))]
        words += [f"--{kind}", *files]
    benchmark.main(words)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["benchmark"] == "finetune"
    for kind, found in line["tasks"].items():
        assert found["train_rows"] >= 32, kind
        assert found["speedup"] > 0
        for who in ("ours", "transformers"):
            assert 0 <= found[who]["scores"][0] <= 100
    assert list(line["tasks"]) == list(benchmark.LENGTHS)


def test_rows_of_transformers_are_ours() -> None:
    rows: Any = benchmark.EncodedRows(
        torch.arange(1, 8, dtype=torch.int32).numpy(),
        torch.tensor([0, 3, 7]).numpy(),
        torch.tensor([3, 2]).numpy(),
        {"labels": torch.tensor([1, 0]).numpy()},
    )

    class Kind:
        kind = "classification"

    found = benchmark.dataset(Kind(), rows, 5)
    assert found["input_ids"][:] == [[1, 2, 3, 0, 0], [4, 5, 6, 7, 0]]
    assert found["attention_mask"][:] == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert found["token_type_ids"][:] == [[0, 0, 0, 0, 0], [0, 0, 1, 1, 0]]
    assert found["labels"][:] == [1, 0]


def test_no_data_is_an_error() -> None:
    with pytest.raises(UserError, match="no data"):
        benchmark.parse([])
