"""The converter as people run it: same seed, same bytes; what is refused; what an interruption leaves behind."""

from __future__ import annotations

import filecmp
import gzip
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streaming import LocalDataset
from tiny import ROOT

from electra_composer.batches.shards import build_data_spec, check_shards, read_meta
from electra_composer.config import ShardsConfig
from electra_composer.corpus import chunks, dry_run, estimate, source_parts
from electra_composer.corpus import tokenizer as tokenizer_module
from electra_composer.corpus.chunks import cut_line, encode_lines, is_validation
from electra_composer.corpus.engines import Processes
from electra_composer.corpus.estimate import estimate_text
from electra_composer.corpus.folder_writer import ShardFolder
from electra_composer.corpus.sources import Sources
from electra_composer.vocabulary import load_tokenizer

SCRIPT = ROOT / "data_prep/convert_owt.py"
DATA = ROOT / "../shared/data"
WORDS = [f"word{i}" for i in range(300)]


def load_main():
    spec = importlib.util.spec_from_file_location("convert_owt", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


main = load_main()


def text(rng, sentences):
    return " ".join(" ".join(rng.choices(WORDS, k=rng.randint(3, 12))).capitalize() + "." for _ in range(sentences))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """300 documents of a few lines, and a vocabulary in which every word is one token."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    documents = ["\n".join(text(rng, rng.randint(1, 3)) for _ in range(rng.randint(1, 12))) for _ in range(300)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "[", "]", "mask", "sep", *WORDS]
    (folder / "vocab.txt").write_text("\n".join([*vocabulary, ""]))
    return folder


def arguments(corpus, out, *more):
    source = ["--source", str(corpus / "corpus.jsonl"), "--tokenizer", str(corpus / "vocab.txt")]
    return [*source, "--out", str(out), "--max-seq-length", "64", "--workers", "1", "--no-progress", *more]


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def rows_of(out, split="train"):
    dataset = LocalDataset(local=str(out), split=split)
    return [dataset[index] for index in range(len(dataset))]


def test_same_seed_same_bytes_whatever_the_workers(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_CHARACTERS", 10_000)
    monkeypatch.setattr(source_parts, "MIN_PART", 20_000)  # many parts, so that workers could get in a muddle
    options = ["--val-fraction", "0.1", "--seed", "3"]
    for out, workers in (("a", "1"), ("b", "2"), ("d", "3")):
        main([*arguments(corpus, tmp_path / out), *options, "--workers", workers])
    names = files_of(tmp_path / "a")
    assert {"meta.json", "train/index.json", "val/index.json", "tokenizer/tokenizer.json"} <= set(names)
    assert len([name for name in names if name.startswith("train/0")]) > 5
    for other in ("b", "d"):
        assert files_of(tmp_path / other) == names
        assert filecmp.cmpfiles(tmp_path / "a", tmp_path / other, names, shallow=False)[1:] == ([], [])
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


def test_warnings(corpus, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b" ".join([b"word1 \xff"] * 400))
    options = ["--source", str(tmp_path / "a.txt"), "--val-fraction", "0.0001"]
    main([*arguments(corpus, tmp_path / "out"), *options][2:])
    printed = capsys.readouterr().err
    assert "of the tokens were dropped" in printed
    assert "--lines sentence and --overflow carry keep them" in printed
    assert "1 documents hold bytes that are not UTF-8" in printed
    assert "the val split is empty" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source", "nothing.txt"], "nothing.txt: no such file or folder"),
        (["--tokenizer", "./nothing"], "tokenizer ./nothing: no such file or folder"),
        (["--out", "{corpus}"], "exists already; choose another --out, or pass --overwrite"),
        (["--out", "{corpus}", "--overwrite"], "is no folder of shards"),
        (["--max-seq-length", "4"], "--max-seq-length is 4; expected 5 to 65535"),
        (["--val-fraction", "1"], "--val-fraction is 1.0; expected a share from 0 to below 1"),
        (["--workers", "0"], "--workers is 0; expected at least 1"),
        (["--master", "local[2]"], "--master local[2] is for --engine spark"),
        (["--weight", "2", "--weight", "3"], "--weight was given 2 times for 1 sources"),
        (["--mixture", "mixture.yaml"], "--mixture names the sources and their weights"),
        (["--drop-lines", "("], "not a regular expression"),
        (["--text-column", "body"], "no column 'body'; there are 'text'"),
        (["--tokenizer", "train", "--vocab-size", "20"], "vocab_size is 20; this text needs at least"),
        (["--compression", "rar"], "--compression rar is unknown to Streaming"),
        (["--json", "{corpus}/no/such.json"], "no such folder"),
    ],
)
def test_one_line_and_exit_2(corpus, tmp_path, capsys, options, message):
    options = [option.format(corpus=corpus) for option in options]
    before = files_of(corpus)
    with pytest.raises(SystemExit) as exit_:
        main([*arguments(corpus, tmp_path / "out"), *options])
    printed = capsys.readouterr().err.strip().split("\n")
    assert exit_.value.code == 2
    assert len(printed) == 1
    assert printed[0].startswith("error: ")
    assert message in printed[0]
    assert os.listdir(tmp_path) == []
    assert files_of(corpus) == before


def test_a_source_cut_short_leaves_nothing(corpus, tmp_path, capsys):
    data = gzip.compress((corpus / "corpus.jsonl").read_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(data[:-100])
    with pytest.raises(SystemExit):
        main([*arguments(corpus, tmp_path / "out"), "--source", str(tmp_path / "a.jsonl.gz")][2:])
    assert "a.jsonl.gz: cannot be read as .jsonl: Truncated compressed stream" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a.jsonl.gz"]


def _processes_that_name(text):
    """Ids of the running processes with this text in their command line (Linux; elsewhere none is found)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in path.read_text():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


SMALL_PARTS = """
import runpy, sys
from electra_composer.corpus import chunks, source_parts
source_parts.MIN_PART, chunks.CHUNK_CHARACTERS = 300_000, 50_000
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_with_small_parts(*command):
    return subprocess.Popen([sys.executable, "-c", SMALL_PARTS, *command], stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    """Three million characters, ten parts."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("long") / "long.txt"
    words = [f"word{number}" for number in range(1, 100)]
    path.write_text("\n\n".join(" ".join(rng.choices(words, k=rng.randint(3, 90))) + "." for _ in range(10_000)))
    return path


@pytest.fixture(scope="module")
def undisturbed(corpus, long_text, tmp_path_factory):
    """Its conversion by one process."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    whole = [str(SCRIPT), *arguments(corpus, out)[2:], "--source", str(long_text)]
    assert start_with_small_parts(*whole).wait(timeout=60) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_an_interrupted_conversion_goes_on_after_its_last_whole_part(
    corpus, long_text, undisturbed, tmp_path, number, code
):
    command = [str(SCRIPT), *arguments(corpus, tmp_path / "out")[2:], "--source", str(long_text), "--workers", "2"]
    process = start_with_small_parts(*command)
    try:
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "out.partial").glob("records/*.json"))) < 2:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(number)
        assert process.wait(timeout=30) == code
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while _processes_that_name(str(tmp_path)):
        assert time.monotonic() < deadline, "workers outlive the conversion"
        time.sleep(0.2)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*/meta.json"))
    if number != signal.SIGKILL:
        assert "the same command goes on" in process.stderr.read()
    whole = tmp_path / "out.partial/whole"
    records = {path.stem for path in (tmp_path / "out.partial/records").glob("*.json")}
    shards = [path.relative_to(whole) for path in whole.glob("*/0*/*.mds") if path.parts[-2] in records]
    times = {path: (whole / path).stat().st_mtime_ns for path in shards}
    assert len(times) >= 2

    process = start_with_small_parts(*command)
    assert process.wait(timeout=60) == 0, process.stderr.read()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    new = tmp_path / "out"
    for path, written in times.items():  # kept, not written again
        assert (new / path).stat().st_mtime_ns == written
    names = files_of(undisturbed)
    assert files_of(new) == names
    assert filecmp.cmpfiles(new, undisturbed, names, shallow=False)[1:] == ([], [])


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="needs the reviews in ../shared/data")
@pytest.mark.parametrize("length", [128, 512])
def test_reviews_are_packed_tightly(tmp_path, length):
    options = ["--source", str(DATA / "corpus"), "--tokenizer", str(DATA / "bert-base-uncased-vocab.txt")]
    options += ["--lines", "sentence", "--max-documents", "4000", "--max-seq-length", str(length), "--no-progress"]
    summary = main([*options, "--out", str(tmp_path / "out"), "--workers", "2"])
    assert summary.splits["train"].fill(length) >= 0.985
    assert summary.total.documents == 4000


# What is said before the work begins.


def gather(corpus, folder, kind):
    """The corpus again, in several files of one kind."""
    texts = [json.loads(line)["text"] for line in (corpus / "corpus.jsonl").read_text().splitlines()]
    texts *= 40
    for part in range(3):
        chosen = texts[part::3]
        if kind == "parquet":
            pq.write_table(pa.table({"text": chosen}), folder / f"{part}.parquet", row_group_size=500)
        elif kind == "txt":
            (folder / f"{part}.txt").write_text("\n\n".join(text.replace("\n\n", "\n") for text in chosen))
        else:
            data = "".join(json.dumps({"text": text}) + "\n" for text in chosen).encode()
            (folder / f"{part}.jsonl.gz").write_bytes(gzip.compress(data))
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
        return  # too little to be read in part; see below
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
    gather(corpus, tmp_path / "in", "jsonl.gz")
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
    assert "--max-documents converts a part" in capsys.readouterr().err


def test_too_little_room_is_said_before_the_start(corpus, tmp_path, monkeypatch, capsys):
    usage = type("usage", (), {"free": 10_000})
    monkeypatch.setattr("electra_composer.corpus.estimate.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(SystemExit):
        main(arguments(corpus, tmp_path / "a" / "out"))
    assert "0.0 MB left, and the shards may need" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
    main([*arguments(corpus, tmp_path / "out"), "--ignore-disk"])
    assert (tmp_path / "out/meta.json").is_file()


# What goes on from an interrupted conversion, and what does not.


class Stop(Exception):
    pass


@pytest.fixture
def interrupted(corpus, long_text, tmp_path, monkeypatch):
    """Options of a conversion of which two parts are done; its folder is `tmp_path / "out"`."""
    monkeypatch.setattr(source_parts, "MIN_PART", 300_000)
    options = [*arguments(corpus, tmp_path / "out")[2:], "--source", str(long_text)]
    convert = Processes.convert

    def stop_after_two(self, plan, jobs, bar):
        assert len(jobs) > 5
        yield from convert(self, plan, jobs[:2], bar)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Processes, "convert", stop_after_two)
        with pytest.raises(Stop):
            main(options)
    assert sorted(os.listdir(tmp_path / "out.partial/records")) == ["00000.json", "00001.json"]
    return options


def test_other_options_do_not_go_on(interrupted, capsys):
    with pytest.raises(SystemExit):
        main([*interrupted, "--max-seq-length", "32"])
    message = capsys.readouterr().err
    assert "max_seq_length: 64 there, 32 now" in message
    assert "--restart" in message
    summary = main([*interrupted, "--max-seq-length", "32", "--restart"])
    assert summary.continued_tokens == 0


def test_a_changed_source_does_not_go_on(long_text, interrupted, tmp_path, capsys):
    changed = tmp_path / "changed.txt"
    changed.write_text(long_text.read_text() + "\n\none more.")
    with pytest.raises(SystemExit):
        main([*interrupted[:-1], str(changed)])
    assert "files:" in capsys.readouterr().err


def test_what_is_done_is_not_done_again(interrupted, tmp_path):
    summary = main(interrupted)
    assert 0.1 < summary.continued_tokens / summary.total.tokens < 0.3
    assert "interrupted run" in str(summary)
    assert os.listdir(tmp_path) == ["out"]


def test_a_trained_vocabulary_is_kept(long_text, tmp_path, monkeypatch):
    monkeypatch.setattr(source_parts, "MIN_PART", 300_000)
    options = ["--source", str(long_text), "--tokenizer", "train", "--vocab-size", "150", "--workers", "1"]
    options += ["--no-progress", "--max-seq-length", "64", "--out"]
    convert = Processes.convert

    def stop_after_one(self, plan, jobs, bar):
        yield from convert(self, plan, jobs[:1], bar)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Processes, "convert", stop_after_one)
        with pytest.raises(Stop):
            main([*options, str(tmp_path / "a")])
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_module, "train_tokenizer", None)  # not done again
        main([*options, str(tmp_path / "a")])
    main([*options, str(tmp_path / "b")])
    names = files_of(tmp_path / "b")
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False)[1:] == ([], [])


def test_two_conversions_do_not_write_one_folder(corpus, tmp_path, capsys):
    with ShardFolder(str(tmp_path / "out"), plan={}), pytest.raises(SystemExit):
        main(arguments(corpus, tmp_path / "out"))
    assert "another conversion is writing" in capsys.readouterr().err


def test_killed_before_the_folder_has_its_name(interrupted, tmp_path, monkeypatch):
    def stop(self):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("electra_composer.storage.shard_folder.Meta.to_json", stop)
        with pytest.raises(Stop):
            main(interrupted)
    assert not (tmp_path / "out").exists()
    summary = main(interrupted)
    assert summary.continued_tokens == summary.total.tokens  # nothing was left to convert
    whole = str(tmp_path / "whole")
    place = interrupted.index("--out") + 1
    main([*interrupted[:place], whole, *interrupted[place + 1 :]])
    names = files_of(whole)
    assert files_of(tmp_path / "out") == names
    assert filecmp.cmpfiles(tmp_path / "out", whole, names, shallow=False)[1:] == ([], [])


def test_a_part_that_was_moved_but_not_recorded_is_made_again(interrupted, tmp_path):
    partial = tmp_path / "out.partial"
    (partial / "records/00001.json").unlink()
    (partial / "whole/train/00001/shard.00000.mds").write_bytes(b"left over")
    summary = main(interrupted)
    place = interrupted.index("--out") + 1
    main([*interrupted[:place], str(tmp_path / "whole"), *interrupted[place + 1 :]])
    names = files_of(tmp_path / "whole")
    assert filecmp.cmpfiles(tmp_path / "out", tmp_path / "whole", names, shallow=False)[1:] == ([], [])
    assert 0 < summary.continued_tokens < summary.total.tokens / 5


def test_a_shard_that_has_gone_is_named(interrupted, tmp_path, capsys):
    (tmp_path / "out.partial/whole/train/00001/shard.00000.mds").unlink()
    with pytest.raises(SystemExit):
        main(interrupted)
    assert "train/00001/shard.00000.mds is missing; pass --restart" in capsys.readouterr().err
