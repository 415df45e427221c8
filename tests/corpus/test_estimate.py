"""Estimates before a conversion begins: text and disk space, and --dry-run."""

from __future__ import annotations

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from converter import arguments, jsonl, main
from tiny import ROOT

from electra_composer.corpus import dry_run, estimate
from electra_composer.corpus.estimate import estimate_text
from electra_composer.corpus.sources import Sources

DATA = ROOT / "../shared/data"


def gather(corpus, folder, kind, times=40):
    """Write the documents of the corpus `times` times to three files of one format; return their texts."""
    texts = [json.loads(line)["text"] for line in (corpus / "corpus.jsonl").read_text().splitlines()]
    texts *= times
    for part in range(3):
        chosen = texts[part::3]
        if kind == "parquet":
            pq.write_table(pa.table({"text": chosen}), folder / f"{part}.parquet", row_group_size=500)
        elif kind == "txt":
            (folder / f"{part}.txt").write_text("\n\n".join(text.replace("\n\n", "\n") for text in chosen))
        else:
            (folder / f"{part}.jsonl.gz").write_bytes(gzip.compress(jsonl(chosen), compresslevel=1))
    return texts


@pytest.mark.parametrize("kind", ["parquet", "txt", "jsonl.gz"])
def test_text_is_estimated_from_a_sample(corpus, tmp_path, monkeypatch, kind):
    texts = gather(corpus, tmp_path, kind)
    size = sum(len(text.encode()) for text in texts)
    source = str(tmp_path)
    whole = estimate_text(Sources.of(source), 1 << 40)
    assert whole.documents == pytest.approx(len(texts), rel=0.02)
    assert whole.text_bytes == pytest.approx(size, rel=0.02)
    if kind == "jsonl.gz":
        return  # too small to be read in part; the next test has a larger file
    monkeypatch.setattr(estimate, "READ_FULLY_BELOW", 0)
    part = estimate_text(Sources.of(source), size // 5)
    assert len(part.sample) < 0.4 * len(texts)
    assert part.text_bytes == pytest.approx(size, rel=0.15)
    assert part.documents == pytest.approx(len(texts), rel=0.15)
    assert estimate_text(Sources.of(source, max_documents=100), size // 5).documents == pytest.approx(100, rel=0.01)
    assert estimate_text(Sources.of(source, max_bytes=1000), size // 5).text_bytes == pytest.approx(1000, rel=0.01)
    assert estimate_text(Sources.of("docstrings"), 10) is None


@pytest.mark.skipif(not DATA.exists(), reason="needs the reviews in ../shared/data")
def test_compressed_reviews_are_estimated_from_a_sample():
    estimated = estimate_text(Sources.of(str(DATA / "corpus")), 1 << 22)
    assert estimated.documents == pytest.approx(50_000, rel=0.1)
    assert estimated.text_bytes == pytest.approx(65e6, rel=0.1)
    assert len(estimated.sample) < 5000


def test_a_dry_run_foretells_the_conversion_and_writes_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "SAMPLE_BYTES", 100_000)
    (tmp_path / "in").mkdir()
    gather(corpus, tmp_path / "in", "jsonl.gz", times=8)
    options = [*arguments(corpus, tmp_path / "out")[2:], "--source", str(tmp_path / "in")]
    told = main([*options, "--dry-run"])
    assert os.listdir(tmp_path) == ["in"]
    made = main(options)
    assert told.documents == pytest.approx(made.total.documents, rel=0.15)
    assert told.tokens == pytest.approx(made.total.tokens, rel=0.15)
    assert told.disk_bytes == pytest.approx(made.shard_bytes, rel=0.25)
    assert "M tokens" in str(told)


def test_a_dry_run_of_what_cannot_be_measured(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--source", "docstrings", "--tokenizer", "train", "--dry-run", "--out", str(tmp_path / "out")])
    assert "convert a part with --max-documents" in capsys.readouterr().err


def test_too_little_room_is_said_before_the_start(corpus, tmp_path, monkeypatch, capsys):
    usage = type("usage", (), {"free": 10_000})
    monkeypatch.setattr("electra_composer.corpus.estimate.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(SystemExit):
        main(arguments(corpus, tmp_path / "a" / "out"))
    assert "0.0 MB left, and the shards may need" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
    main([*arguments(corpus, tmp_path / "out"), "--ignore-disk"])
    assert (tmp_path / "out/meta.json").is_file()
