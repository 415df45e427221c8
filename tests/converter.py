"""The converter as a function, and helpers for its sources and output."""

from __future__ import annotations

import filecmp
import importlib.util
import io
import json
import random
import tarfile
from pathlib import Path

from streaming import LocalDataset
from tiny import ROOT

from electra_composer.corpus.conversion import Conversion, convert
from electra_composer.vocabulary import load_tokenizer

SCRIPT = ROOT / "data_prep/convert_owt.py"
WORDS = [f"word{i}" for i in range(300)]


def load_main():
    spec = importlib.util.spec_from_file_location("convert_owt", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


main = load_main()


def arguments(corpus, out, *more):
    source = ["--source", str(corpus / "corpus.jsonl"), "--tokenizer", str(corpus / "vocab.txt")]
    return [*source, "--out", str(out), "--max-seq-length", "64", "--workers", "1", "--no-progress", *more]


def text(rng, sentences):
    return " ".join(" ".join(rng.choices(WORDS, k=rng.randint(3, 12))).capitalize() + "." for _ in range(sentences))


def write_vocabulary(folder, *words):
    path = Path(folder) / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *words, ""]))
    return str(path)


def jsonl(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def tar_of(files, mode="w"):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def assert_same_files(a, b):
    """Assert that two folders have the same files with the same bytes."""
    names = files_of(a)
    assert files_of(b) == names
    assert filecmp.cmpfiles(a, b, names, shallow=False)[1:] == ([], [])


def rows_of(out, split="train"):
    dataset = LocalDataset(local=str(out), split=split)
    return [dataset[index] for index in range(len(dataset))]


def write_source(path, count, word, seed=0):
    """Write documents of distinct texts that begin with the given word; return the texts."""
    rng = random.Random(seed)
    texts = [f"{word} {' '.join(rng.choices(WORDS[100:], k=rng.randint(8, 30)))}." for _ in range(count)]
    path.write_bytes(jsonl(texts))
    return texts


def convert_sources(sources, out, vocabulary, **options):
    options = {"val_fraction": 0.0, "max_seq_length": 64, "progress": False, "overflow": "carry", **options}
    return convert(Conversion(sources, str(out), vocabulary, **options))


def documents_of(out, vocabulary, split="train"):
    """Return the decoded examples of a folder of shards."""
    tokenizer = load_tokenizer(vocabulary)
    found = []
    for row in rows_of(out, split):
        start = 0
        for a, b in row["segment_lengths"].reshape(-1, 2).tolist():
            ids = row["input_ids"][start : start + a + b].tolist()
            found.append(tokenizer.decode(ids, skip_special_tokens=True))
            start += a + b
    return found
