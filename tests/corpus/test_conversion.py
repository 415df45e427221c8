"""Command-line conversions: deterministic shards that hold every token and that the trainer's loader reads."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from converter import WORDS, arguments, assert_same_files, files_of, main, rows_of
from tiny import ROOT

from electra_composer.batches.checks import check_shards
from electra_composer.batches.shards import build_data_spec, read_meta
from electra_composer.config import ShardsConfig
from electra_composer.corpus import chunks, source_parts
from electra_composer.corpus.chunks import cut_line, encode_lines, is_validation
from electra_composer.vocabulary import load_tokenizer

DATA = ROOT / "../shared/data"


def test_same_seed_same_bytes_whatever_the_workers(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_CHARACTERS", 10_000)
    monkeypatch.setattr(source_parts, "MIN_PART", 20_000)  # many parts, so that their order could vary
    options = ["--val-fraction", "0.1", "--seed", "3"]
    for out, workers in (("a", "1"), ("b", "2"), ("d", "3")):
        main([*arguments(corpus, tmp_path / out), *options, "--workers", workers])
    names = files_of(tmp_path / "a")
    assert {"meta.json", "train/index.json", "val/index.json", "tokenizer/tokenizer.json"} <= set(names)
    assert len([name for name in names if name.startswith("train/0")]) > 5
    for other in ("b", "d"):
        assert_same_files(tmp_path / "a", tmp_path / other)
    main([*arguments(corpus, tmp_path / "c"), "--val-fraction", "0.1", "--seed", "4"])
    shard = "train/00000/shard.00000.mds"
    assert (tmp_path / "c" / shard).read_bytes() != (tmp_path / "a" / shard).read_bytes()


@pytest.mark.parametrize("packing", ["packed", "one"])
@pytest.mark.parametrize("lines", ["newline", "sentence"])
def test_carried_examples_hold_every_token_once(corpus, tmp_path, packing, lines, capsys):
    options = ["--overflow", "carry", "--packing", packing, "--lines", lines, "--json", str(tmp_path / "summary.json")]
    summary = main([*arguments(corpus, tmp_path / "out"), *options])
    tokenizer = load_tokenizer(str(corpus / "vocab.txt"))
    expected = sorted(
        i
        for line in (corpus / "corpus.jsonl").read_text().splitlines()
        for i in tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
    )
    rows = [row for split in ("train", "val") if summary.splits[split].rows for row in rows_of(tmp_path / "out", split)]
    assert sorted(i for row in rows for i in row["input_ids"].tolist() if i not in (2, 3)) == expected
    assert max(len(row["input_ids"]) for row in rows) <= 64
    assert summary.total.dropped_tokens == 0
    assert summary.total.documents == 300
    assert summary.total.rows == len(rows)
    assert summary.total.examples == sum(len(row["segment_lengths"]) // 2 for row in rows)
    assert summary.total.tokens == sum(len(row["input_ids"]) for row in rows)
    assert (packing == "one") == (summary.total.rows == summary.total.examples)
    assert (
        json.loads((tmp_path / "summary.json").read_text())["splits"]["train"]["rows"] == summary.splits["train"].rows
    )
    printed = capsys.readouterr().out
    for word in ("documents", "examples", "rows", "tokens", "fill", "dropped tokens", " s, ", "tokens/s", "bytes of"):
        assert word in printed


def test_shards_are_what_the_loader_wants(corpus, tmp_path):
    out = str(tmp_path / "out")
    main([*arguments(corpus, out), "--tokenizer", "train", "--vocab-size", "400", "--compression", "zstd"])
    meta = read_meta(out)
    tokenizer = load_tokenizer(meta.tokenizer_folder)
    check_shards(meta, tokenizer, 64)
    assert meta.tokenizer.name == f"trained-{len(tokenizer)}"
    spec = build_data_spec(ShardsConfig(path=out, max_seq_length=64, num_workers=0), "train", 4, meta, seed=0)
    batch = next(iter(spec.dataloader))
    assert batch["input_ids"].shape == (4, 64)
    first = batch["position_ids"] == 0
    assert (batch["input_ids"][first & (batch["sequence_ids"] > 0)] == meta.tokenizer.special_ids["cls"]).all()


def test_split_by_document():
    chosen = [number for number in range(100_000) if is_validation(5, number, 0.02)]
    assert abs(len(chosen) - 2000) < 4 * (100_000 * 0.02 * 0.98) ** 0.5
    assert [number for number in range(1000) if is_validation(5, number, 0.02)] == [n for n in chosen if n < 1000]
    assert [number for number in range(100_000) if is_validation(6, number, 0.02)] != chosen


def test_special_tokens_in_the_text_are_text(corpus, tmp_path):
    (tmp_path / "a.txt").write_text("word1 [MASK] word2 [SEP] word3 [PAD]")
    main([*arguments(corpus, tmp_path / "out"), "--source", str(tmp_path / "a.txt"), "--val-fraction", "0"][2:])
    tokenizer = load_tokenizer(str(corpus / "vocab.txt"))
    tokens = tokenizer.convert_ids_to_tokens(rows_of(tmp_path / "out")[0]["input_ids"].tolist())
    assert tokens == ["[CLS]", "word1", "[", "mask", "]", "word2", "[", "sep", "]", "word3", "[", "[UNK]", "]", "[SEP]"]


def test_a_document_of_10_mb(corpus, tmp_path):
    rng = random.Random(1)
    words = [*rng.choices(WORDS, k=1_400_000)]
    (tmp_path / "a.txt").write_text(" ".join(words))
    assert (tmp_path / "a.txt").stat().st_size > 10_000_000
    options = ["--source", str(tmp_path / "a.txt"), "--val-fraction", "0", "--overflow", "carry"]
    summary = main([*arguments(corpus, tmp_path / "out"), *options][2:])
    assert summary.total.documents == 1
    rows = rows_of(tmp_path / "out")
    assert sum(len(row["input_ids"]) - len(row["segment_lengths"]) for row in rows) == 1_400_000
    assert len(rows) == pytest.approx(1_400_000 / 62, rel=0.001)


def test_long_lines_are_cut_where_no_word_is_cut(corpus, monkeypatch):
    monkeypatch.setattr(chunks, "_MAX_LINE", 100)
    tokenizer = load_tokenizer(str(corpus / "vocab.txt")).backend_tokenizer
    rng = random.Random(2)
    lines = [" ".join(rng.choices(WORDS, k=rng.choice([1, 5, 100]))) for _ in range(50)]
    for line in lines:
        pieces = list(cut_line(line, 100))
        assert "".join(pieces) == line
        assert max(map(len, pieces)) <= 100
    encoded = [np.array(ids).tolist() for ids in encode_lines(tokenizer, lines)]
    assert encoded == [tokenizer.encode(line, add_special_tokens=False).ids for line in lines]
    assert [len(piece) for piece in cut_line("x" * 250, 100)] == [100, 100, 50]


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="needs the reviews in ../shared/data")
@pytest.mark.parametrize("length", [128, 512])
def test_reviews_are_packed_tightly(tmp_path, length):
    options = ["--source", str(DATA / "corpus"), "--tokenizer", str(DATA / "bert-base-uncased-vocab.txt")]
    options += ["--lines", "sentence", "--max-documents", "4000", "--max-seq-length", str(length), "--no-progress"]
    summary = main([*options, "--out", str(tmp_path / "out"), "--workers", "2"])
    assert summary.splits["train"].fill(length) >= 0.985
    assert summary.total.documents == 4000
