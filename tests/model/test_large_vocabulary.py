"""Convert, load, train and export with a vocabulary above 65,535, whose ids need four bytes."""

from __future__ import annotations

import json
import random
import sys

import numpy as np
import programs
import pytest
from tiny import ROOT
from transformers import ElectraForMaskedLM, ElectraForPreTraining

from electra_composer.batches.row_reader import reader_of_split
from electra_composer.batches.shards import build_data_spec, read_data
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.export import main as export
from electra_composer.pretrain import main as pretrain
from electra_composer.vocabulary import SPECIAL_TOKENS, load_tokenizer

ENTRIES = 70_000
WORDS = [f"w{number}" for number in range(ENTRIES - len(SPECIAL_TOKENS))]


@pytest.mark.slow
def test_the_whole_way(tiny_yaml, tmp_path):
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in [*SPECIAL_TOKENS, *WORDS]))
    rng = random.Random(0)
    documents = [" ".join(rng.choices(WORDS, k=60)) for _ in range(40)] + ["w69994 w0 " * 20]
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    command = [sys.executable, str(ROOT / "data_prep/convert_owt.py")]
    options = ["--max-seq-length=32", "--val-fraction=0.1", "--workers=1", "--no-progress", "--overflow=carry"]
    places = ["--source", tmp_path / "text.txt", "--tokenizer", tmp_path / "vocab.txt", "--out", tmp_path / "shards"]
    done = programs.run([*command, *options, *map(str, places)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "shards/train/index.json").read_text())
    assert {shard["column_encodings"][0] for shard in index["shards"]} == {"ndarray:uint32"}

    settings = [f"data.path={tmp_path / 'shards'}", "trainer.max_duration=1ba", "schedule.warmup=0ba"]
    config = load_config(str(tiny_yaml), settings, PretrainConfig)
    meta = read_data(config.data)
    tokenizer = load_tokenizer(meta.tokenizer_folder)
    assert len(tokenizer) == meta.tokenizer.vocab_size == ENTRIES
    reader = reader_of_split(config.data.path, "train")
    ids = reader.read(np.arange(reader.rows)).input_ids
    assert ids.max() > np.iinfo(np.uint16).max
    batches = build_data_spec(config.data, "train", 8, meta, seed=0).dataloader
    seen = np.concatenate([batch["input_ids"].numpy().ravel() for batch in batches])
    assert set(seen) - {0} <= set(ids)
    assert seen.max() > np.iinfo(np.uint16).max

    trained = pretrain(config)
    assert trained.state.timestamp.batch.value == 1
    export([str(tmp_path / "run"), str(tmp_path / "export")])
    for kind, folder in ((ElectraForPreTraining, "discriminator"), (ElectraForMaskedLM, "generator")):
        model, loading = kind.from_pretrained(tmp_path / "export" / folder, output_loading_info=True)
        assert not any(loading.values())
        assert model.get_input_embeddings().weight.shape == (ENTRIES, 16)
    exported = load_tokenizer(str(tmp_path / "export/discriminator"))
    assert exported("w69994")["input_ids"] == [2, ENTRIES - 1, 3]
