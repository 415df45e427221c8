"""Exports load in transformers and compute what our model computes; a killed export loses nothing."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from kill_points import interrupt_everywhere, tree_of
from shared_fixtures import LENGTH, VOCAB_SIZE
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    ElectraTokenizerFast,
    pipeline,
)

from electra_composer.checkpoints.weights import Checkpoint
from electra_composer.config import ObjectiveConfig
from electra_composer.errors import UserError
from electra_composer.export import export, networks_of
from electra_composer.model.kernels.attention import pattern_of
from electra_composer.vocabulary import load_tokenizer

MAX_POSITIONS = 40  # of `tiny_model_config`
LONG_TEXT = " ".join(f"w{number % 90}" for number in range(2000))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def make_checkpoint(make_model, tiny_model_config, tmp_path):
    """`make_checkpoint(kind)`: with a `BertTokenizer` or a `tokenizer.json` of `tokenizers`."""

    def make(kind="vocab.txt", seed=0, **sizes):
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(VOCAB_SIZE - 5))]
        path = tmp_path / "vocab.txt"
        path.write_text("\n".join(words))
        tokenizer = ElectraTokenizerFast(vocab_file=str(path))
        if kind == "tokenizer.json":
            Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()).save(str(tmp_path / kind))
            tokenizer = load_tokenizer(str(tmp_path / kind))
        config = {
            "model": asdict(tiny_model_config(**sizes)),
            "objective": asdict(ObjectiveConfig()),
            "data": {"max_seq_length": LENGTH},
        }
        state = make_model(tiny_model_config(**sizes), seed=seed).state_dict()
        return Checkpoint("a.pt", state, config, tokenizer)

    return make


def features_of_ours(checkpoint, ids):
    """Return hidden states and logits of the discriminator, and logits of the generator, of one example."""
    model = checkpoint.build_model()
    positions, types = torch.arange(ids.shape[1])[None], torch.zeros_like(ids)
    pattern = pattern_of(torch.ones_like(ids), "sdpa")
    hidden = model.discriminator(model.embeddings(ids, types, positions), pattern)
    generated = model.generate(ids, positions, types, positions, pattern)
    return hidden, model.discriminate(ids, types, positions, pattern), model.mlm_logits(generated)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("vocab.txt", {}),
        ("tokenizer.json", {"sharing": "untied", "generator_size": 0.75}),
        ("vocab.txt", {"sharing": "gdes"}),
        ("vocab.txt", {"embedding_size": 32}),
    ],
)
@torch.no_grad()
def test_the_round_trip_through_transformers(make_checkpoint, tmp_path, kind, sizes):
    checkpoint = make_checkpoint(kind, **sizes)
    export(checkpoint, str(tmp_path / "export"))
    discriminator, generator = str(tmp_path / "export/discriminator"), str(tmp_path / "export/generator")
    for folder in (discriminator, generator):
        tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
        assert tokenizer.model_max_length == config.max_position_embeddings == MAX_POSITIONS
        batch = tokenizer(LONG_TEXT, truncation=True, return_tensors="pt")
        assert batch["input_ids"].shape == (1, MAX_POSITIONS)
    hidden, rtd_logits, mlm_logits = features_of_ours(checkpoint, batch["input_ids"])
    for load, folder, output, expected in (
        (AutoModel, discriminator, "last_hidden_state", hidden),
        (AutoModelForPreTraining, discriminator, "logits", rtd_logits),
        (AutoModelForMaskedLM, generator, "logits", mlm_logits),
    ):
        torch.testing.assert_close(load.from_pretrained(folder)(**batch)[output], expected, **CLOSE)

    features = pipeline("feature-extraction", discriminator, device="cpu", tokenize_kwargs={"truncation": True})
    torch.testing.assert_close(torch.tensor(features(LONG_TEXT)), hidden, **CLOSE)
    text = f"w1 w2 [MASK] w3 {LONG_TEXT}"
    ids = tokenizer(text, truncation=True, return_tensors="pt")["input_ids"]
    best = features_of_ours(checkpoint, ids)[2][0, 3].softmax(-1).topk(4)
    fill = pipeline("fill-mask", generator, device="cpu", top_k=4, tokenizer_kwargs={"truncation": True})
    found = fill(text)
    assert [each["token"] for each in found] == best.indices.tolist()
    assert [each["score"] for each in found] == pytest.approx(best.values.tolist(), rel=1e-4)


def test_a_killed_export_loses_nothing(make_checkpoint, tmp_path, monkeypatch):
    """Also not the export that it replaces; the same command finishes it and leaves nothing else behind."""
    # Without the generator: half of the time.
    monkeypatch.setattr("electra_composer.export.networks_of", lambda checkpoint: networks_of(checkpoint)[:1])
    before, after = make_checkpoint(seed=1), make_checkpoint(seed=2)
    export(before, str(tmp_path / "before"))
    export(after, str(tmp_path / "after"))
    whole = [tree_of(tmp_path / name) for name in ("before", "after")]

    def prepare(folder):
        export(before, str(folder / "export"))

    def intact(folder):
        found = [tree_of(folder / name) for name in ("export", ".replaced-export") if (folder / name).exists()]
        assert found
        assert all(tree in whole for tree in found)

    calls = interrupt_everywhere(
        tmp_path, lambda folder: export(after, str(folder / "export"), overwrite=True), prepare, intact=intact
    )
    assert "before rename .unfinished-export" in calls


def test_an_export_that_a_kill_left_under_another_name_is_there(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    export(checkpoint, str(tmp_path / "export"))
    whole = tree_of(tmp_path / "export")
    (tmp_path / "export").rename(tmp_path / ".replaced-export")  # killed between the two renames
    with pytest.raises(UserError, match=r"export exists already; .*--overwrite"):
        export(checkpoint, str(tmp_path / "export"))
    assert tree_of(tmp_path / "export") == whole


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_export_is_not_replaced(make_checkpoint, tmp_path, kind):
    mine = tmp_path / "mine" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"is not an export, so --overwrite does not replace it"):
        export(make_checkpoint(), str(mine if kind == "file" else mine.parent), overwrite=True)
    assert mine.read_text() == "mine"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let writing of larger files fail with EFBIG, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_export_that_does_not_fit(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    before = sorted(os.listdir(tmp_path))
    for size in (500, 20_000):  # the configuration, the weights
        with largest_file(size), pytest.raises(UserError, match=r"cannot write the export to .*nothing was kept"):
            export(checkpoint, str(tmp_path / "export"))
        assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_of_an_export_follow_the_umask(make_checkpoint, tmp_path, umask):
    checkpoint, former = make_checkpoint(), os.umask(umask)
    try:
        export(checkpoint, str(tmp_path / "export"))
    finally:
        os.umask(former)
    paths = [tmp_path / "export", *Path(tmp_path, "export").rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_file()} == {0o666 & ~umask}
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_dir()} == {0o777 & ~umask}
