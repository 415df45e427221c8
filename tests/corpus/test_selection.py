"""Deduplication and limits over parts: same documents as from a single reader of all sources."""

from __future__ import annotations

import random

import pytest
from converter import jsonl

from electra_composer.corpus import selection, source_parts
from electra_composer.corpus.documents import ReadStats, part_documents, read_documents
from electra_composer.corpus.selection import Selection, scan_part, select
from electra_composer.corpus.source_parts import list_parts
from electra_composer.corpus.sources import Sources


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Two files of 300 documents with many copies, divided into many parts."""
    monkeypatch.setattr(source_parts, "MIN_PART", 2000)
    rng = random.Random(0)
    texts = [f"document {number} " + "word " * rng.randint(0, 20) for number in range(200)]
    for name in ("a", "b"):
        chosen = rng.choices(texts, k=300)
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(chosen))
    return tmp_path


@pytest.mark.parametrize("deduplicate", [False, True])
@pytest.mark.parametrize("limit", [{}, {"max_documents": 77}, {"max_bytes": 5000}, {"max_documents": 10**6}])
def test_the_same_documents_as_of_one_reader(corpus, deduplicate, limit):
    sources = Sources.of(str(corpus / "a.jsonl"), str(corpus / "b.jsonl"), deduplicate=deduplicate, **limit)
    stats = ReadStats()
    expected = list(read_documents(sources, stats))
    parts = list_parts(sources, [])
    assert len(parts) > 10
    scanned = []

    def scan(wanted):
        for part in wanted:
            scanned.append(part)
            yield scan_part(sources, part)

    selections = select(parts, sources, scan)
    found = []
    for part, chosen in zip(parts, selections, strict=True):
        texts = [document.text for document in part_documents(part, sources, ReadStats())]
        mask = [True] * len(texts) if chosen.chosen is None else chosen.chosen.tolist()
        found += [text for text, taken in zip(texts, mask, strict=False) if taken]
    assert found == expected
    if deduplicate and not limit:
        assert sum(part.duplicates for part in selections) == stats.duplicates > 100
    if limit.get("max_documents") == 77:
        assert len(scanned) < len(parts)  # no further than needed
    if not deduplicate and not limit:
        assert not scanned


def test_it_is_kept(tmp_path, corpus):
    sources = Sources.of(str(corpus / "a.jsonl"), deduplicate=True)
    parts = list_parts(sources, [])
    selections = select(parts, sources, lambda wanted: (scan_part(sources, part) for part in wanted))
    assert selection.load(str(tmp_path)) is None
    selection.save(str(tmp_path), [*selections, Selection(None)])
    loaded = selection.load(str(tmp_path))
    assert loaded[-1] == Selection(None)
    for before, after in zip(selections, loaded, strict=False):
        assert before.duplicates == after.duplicates
        assert before.chosen.tolist() == after.chosen.tolist()
