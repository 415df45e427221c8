"""Corpora of few documents: no split is empty, whatever the seed, and larger corpora are split as before."""

from __future__ import annotations

import random
import shutil

import pytest
from converter import WORDS, assert_same_files, jsonl, rows_of, write_vocabulary

from electra_composer.batches.shards import read_meta
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.corpus import source_parts
from electra_composer.corpus.chunks import is_validation, split_hash
from electra_composer.corpus.conversion import Conversion, convert
from electra_composer.corpus.documents import ReadStats, part_documents
from electra_composer.corpus.engines import Processes
from electra_composer.corpus.sources import Source, Sources
from electra_composer.corpus.splits import UNKNOWN, changes, split_limit
from electra_composer.errors import UserError
from electra_composer.pretrain import main as pretrain


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary"), *WORDS)


def write_source(path, count, seed=0):
    rng = random.Random(seed)
    path.write_bytes(jsonl([" ".join(rng.choices(WORDS, k=rng.randint(30, 60))) for _ in range(count)]))
    return str(path)


def run(sources, out, vocabulary, **options):
    options = {"max_seq_length": 64, "progress": False, **options}
    sources = sources if isinstance(sources, Sources) else Sources.of(sources)
    return convert(Conversion(sources, str(out), vocabulary, **options))


def lowest_and_highest(path, seed):
    """Return the hashes of the documents of a source, by the definition of the split."""
    sources = Sources.of(path)
    part = source_parts.Part(0, 0, (source_parts.Slice(path),))
    return sorted(split_hash(seed, document.digest) for document in part_documents(part, sources, ReadStats()))


@pytest.mark.parametrize("count", [2, 3, 10, 200])
@pytest.mark.parametrize("packing", ["packed", "one"])
def test_at_least_one_document_per_split(tmp_path, vocabulary, monkeypatch, count, packing):
    # A few parts, of which only one is converted again.
    monkeypatch.setattr(source_parts, "MIN_PART", 70 * count)
    path = write_source(tmp_path / "a.jsonl", count)
    for seed in range(8):
        hashes = lowest_and_highest(path, seed)
        if hashes[0] >= 0.005:
            break
    assert hashes[0] >= 0.005  # no document would be in validation
    first = run(path, tmp_path / "one", vocabulary, packing=packing, seed=seed)
    assert first.splits["val"].documents == 1
    assert first.splits["train"].documents == count - 1
    assert first.filled_split == "val"
    assert len(rows_of(tmp_path / "one", "val")) == first.splits["val"].rows > 0
    run(path, tmp_path / "three", vocabulary, packing=packing, seed=seed, workers=3)
    assert_same_files(tmp_path / "one", tmp_path / "three")
    # The same shards as with a fraction that takes that document in the first place.
    run(path, tmp_path / "fraction", vocabulary, packing=packing, seed=seed, val_fraction=(hashes[0] + hashes[1]) / 2)
    for name in ("meta.json", "plan.json"):  # which have the fraction
        (tmp_path / "one" / name).unlink()
        (tmp_path / "fraction" / name).unlink()
    assert_same_files(tmp_path / "one", tmp_path / "fraction")


def test_the_training_split_gets_a_document_too(tmp_path, vocabulary):
    path = write_source(tmp_path / "a.jsonl", 3)
    sources = Sources([Source(path, weight=2)])
    summary = run(sources, tmp_path / "out", vocabulary, val_fraction=0.999999)
    assert (summary.splits["val"].documents, summary.splits["train"].documents) == (2, 2)  # in train it is taken twice
    assert summary.filled_split == "train"


def test_mixed_sources_with_copies_of_a_text(tmp_path, vocabulary, monkeypatch):
    """The document that moves is in two parts and in two copies; it is in no split but validation, and once there."""
    monkeypatch.setattr(source_parts, "MIN_PART", 400)
    paths = [write_source(tmp_path / f"{name}.jsonl", 5, seed) for seed, name in enumerate("ab")]
    seed = next(
        seed
        for seed in range(50)
        if lowest_and_highest(paths[0], seed)[0] < min(0.3, lowest_and_highest(paths[1], seed)[0])
    )
    lowest = lowest_and_highest(paths[0], seed)[0]
    shutil.copy(paths[0], tmp_path / "c.jsonl")
    sources = Sources([Source(paths[0], weight=3), Source(paths[1]), Source(str(tmp_path / "c.jsonl"), weight=1.5)])
    summary = run(sources, tmp_path / "out", vocabulary, seed=seed, val_fraction=lowest / 2, workers=2)
    assert summary.filled_split == "val"
    assert summary.splits["val"].documents == 2  # once of each source
    val = {tuple(row["input_ids"].tolist()) for row in rows_of(tmp_path / "out", "val")}
    train = {tuple(row["input_ids"].tolist()) for row in rows_of(tmp_path / "out")}
    assert not val & train


def test_one_document_is_refused(tmp_path, vocabulary):
    path = write_source(tmp_path / "a.jsonl", 1)
    (tmp_path / "twice.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes() * 2)
    for name in ("a", "twice"):
        with pytest.raises(UserError, match=r"only one document .* --val-fraction 0"):
            run(str(tmp_path / f"{name}.jsonl"), tmp_path / "out", vocabulary)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "twice.jsonl"]
    assert run(path, tmp_path / "out", vocabulary, val_fraction=0.0).total.documents == 1


def test_documents_without_tokens_do_not_count(tmp_path, vocabulary):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["\x00\x01", "word1 word2", "word3 word4", "\x02"]))
    summary = run(str(tmp_path / "a.jsonl"), tmp_path / "out", vocabulary)
    assert all(split.rows == 1 for split in summary.splits.values())
    (tmp_path / "b.jsonl").write_bytes(jsonl(["\x00\x01", "\x02"]))
    with pytest.raises(UserError, match="no text in"):
        run(str(tmp_path / "b.jsonl"), tmp_path / "none", vocabulary)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", ["before the second pass", "within it"])
def test_interrupted_while_a_split_gets_its_document(tmp_path, vocabulary, monkeypatch, stop_at):
    monkeypatch.setattr(source_parts, "MIN_PART", 400)
    path = write_source(tmp_path / "a.jsonl", 12)
    file = tmp_path / "a.jsonl"
    file.write_bytes(file.read_bytes() * 2)  # every text is in two parts
    run(path, tmp_path / "undisturbed", vocabulary, val_fraction=1e-9)
    convert_parts, calls = Processes.convert, []

    def stop(self, context, jobs, bar):
        calls.append(len(jobs))
        if len(calls) < 2:
            yield from convert_parts(self, context, jobs, bar)
            return
        assert len(jobs) == 2
        if stop_at == "within it":
            yield from convert_parts(self, context, jobs[:1], bar)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Processes, "convert", stop)
        with pytest.raises(Stop):
            run(path, tmp_path / "out", vocabulary, val_fraction=1e-9)
    assert calls[1] == 2 < calls[0]
    run(path, tmp_path / "out", vocabulary, val_fraction=1e-9)
    assert_same_files(tmp_path / "out", tmp_path / "undisturbed")


def test_pretraining_on_a_small_corpus(tmp_path, vocabulary, tiny_yaml):
    run(write_source(tmp_path / "a.jsonl", 200), tmp_path / "out", vocabulary, max_seq_length=32, val_fraction=1e-9)
    meta = read_meta(str(tmp_path / "out"))
    assert meta.splits["val"].documents == 1
    settings = [f"data.path={tmp_path / 'out'}", "trainer.max_duration=2ba", "schedule.warmup=1ba"]
    trainer = pretrain(load_config(str(tiny_yaml), settings, PretrainConfig))
    assert trainer.state.timestamp.batch.value == 2
    assert trainer.state.eval_metric_values


def test_limit():
    def records(*hashes):
        return [{"split_hashes": list(part), "val_fraction": 0.3} for part in hashes]

    assert split_limit(records((0.1, 0.2), (0.2, 0.9)), 0.3) == 0.3
    raised = split_limit(records((0.5, 0.6), (0.4, 0.9), ()), 0.3)
    assert 0.4 < raised < 0.4 + 1e-15
    assert [changes(record, raised) for record in records((0.5, 0.6), (0.4, 0.9), ())] == [False, True, False]
    assert split_limit(records((0.1, 0.2), (0.05, 0.1)), 0.3) == 0.2
    assert split_limit([{}], 0.3) == 0.3  # converted by an earlier version
    assert not changes({}, 0.3)
    assert split_limit(records((0.5, 0.5)), 0.0) == 0.0
    assert UNKNOWN == (0.0, 1.0)
    with pytest.raises(UserError, match="only one document"):
        split_limit(records((0.5, 0.5)), 0.3)
    assert [is_validation(0, 3, fraction) for fraction in (split_hash(0, 3), 1.0)] == [False, True]
