"""Helpers of the finetuning tests: a tiny discriminator, tiny tasks in the official layout, settings for short runs."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import ElectraConfig, ElectraForPreTraining, ElectraTokenizerFast

from electra_composer.tasks.encoded import EncodedRows

WORDS = ["good", "bad", "film", "the", "a", "dull", "fine", "plot", "is", "was", "very", "and"]
ENTRIES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
SIZES = {"train": 64, "dev": 23, "test": 11}
NLI = ["entailment", "neutral", "contradiction"]

LETTERS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop", '"', "."]
PAD, CLS, SEP, A = 0, 2, 3, 5  # ids in LETTERS; A: the letter a
MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\ta b c\td\n0\t3\t4\te\tf g\n"


def ids(encoded: EncodedRows) -> list[list[int]]:
    """Return the token ids of each example."""
    return [encoded[i].input_ids.tolist() for i in range(len(encoded))]


def write_source(folder: Path, model: type = ElectraForPreTraining) -> str:
    """Write a Hugging Face folder with a tiny discriminator."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(ENTRIES) + "\n")
    ElectraTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = ElectraConfig(
        vocab_size=len(ENTRIES),
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,  # a model this small does not learn with the default
    )
    model(config).save_pretrained(folder)
    return str(folder)


def write_data(folder: Path, tests: bool = False) -> str:
    """Write SST-2 (label: whether `good` occurs) and STS-B (score: number of words in common).

    With `tests`, also write their test sets, and RTE, MNLI and AX, whose labels are made like those of STS-B.
    """
    rng = random.Random(0)
    parts = ("train", "dev", "test") if tests else ("train", "dev")
    for part in parts:
        _write(folder / "SST-2" / f"{part}.tsv", _sentences(rng, part))
        _write(folder / "STS-B" / f"{part}.tsv", _pairs(rng, part, "score", [f"{n}.000" for n in range(6)]))
        if not tests:
            continue
        _write(folder / "RTE" / f"{part}.tsv", _pairs(rng, part, "label", ["entailment", "not_entailment"]))
        for suffix in ("",) if part == "train" else ("_matched", "_mismatched"):
            _write(folder / "MNLI" / f"{part}{suffix}.tsv", _pairs(rng, part, "gold_label", NLI))
    if tests:
        _write(folder / "AX" / "diagnostic.tsv", _pairs(rng, "test", "label", NLI))
    return str(folder)


def write_wnli(folder: Path) -> str:
    """Write WNLI, in which every right candidate is `film`."""
    (folder / "WNLI").mkdir(parents=True)
    for part, size in (("train", 24), ("dev", 9), ("test", 7)):
        rows = ["index\tsentence1\tsentence2" + ("" if part == "test" else "\tlabel")]
        for index in range(size):
            word = WORDS[index % 3]
            row = f"{index}\tThe film was better than the plot because it was {word} .\t"
            row += f"The {'film' if index % 2 else 'plot'} was {word} ."
            rows.append(row + ("" if part == "test" else f"\t{index % 2}"))
        (folder / "WNLI" / f"{part}.tsv").write_text("\n".join(rows) + "\n")
    return str(folder)


def settings(source: str, data: str, folder: Path) -> list[str]:
    """Return overrides of yamls/glue.yaml."""
    return [
        f"model.source={source}",
        f"data.path={data}",
        "data.cache=null",
        "data.max_seq_length=24",
        "data.num_workers=0",
        "tasks=[sst2]",
        "seeds=[1]",
        f"checkpoints.folder={folder}/run",
        f"results={folder}/run/results.json",
        "trainer.device=cpu",
        "trainer.precision=fp32",
        "trainer.global_train_batch_size=8",
        "trainer.progress_bar=false",
        "trainer.max_duration=2ep",
        "optimizer.lr=2e-3",
    ]


def _sentences(rng: random.Random, part: str) -> list[list[str]]:
    rows = [["index", "sentence"] if part == "test" else ["sentence", "label"]]
    for index in range(SIZES[part]):
        words = [rng.choice(WORDS[1:]) for _ in range(rng.randint(2, 9))]
        text = " ".join(["good", *words] if index % 2 else words)
        rows.append([str(index), text] if part == "test" else [f"{text} ", str(index % 2)])
    return rows


def _pairs(rng: random.Random, part: str, label: str, labels: list[str]) -> list[list[str]]:
    rows = [["index", "sentence1", "sentence2", *([] if part == "test" else [label])]]
    for index in range(SIZES[part]):
        first, second = ([rng.choice(WORDS) for _ in range(5)] for _ in range(2))
        shared = min(len(set(first) & set(second)), len(labels) - 1)
        rows.append([str(index), " ".join(first), " ".join(second), *([] if part == "test" else [labels[shared]])])
    return rows


def _write(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
