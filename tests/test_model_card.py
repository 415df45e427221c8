"""Model cards: what they say of a checkpoint, by networks, data and settings; no path of this machine is in them."""

from __future__ import annotations

import copy
import json

import yaml
from huggingface_hub import ModelCard
from tiny import ROOT

from electra_composer import __version__
from electra_composer.checkpoints.weights import read_checkpoint
from electra_composer.model_card import TAG, build_card, networks_in

V01 = ROOT / "tests/data/v0.1"
BOTH = {"discriminator": "ElectraForPreTraining", "generator": "ElectraForMaskedLM"}


def checkpoint_of(**data):
    checkpoint = read_checkpoint(str(V01 / "run"))
    checkpoint.config = copy.deepcopy(checkpoint.config)
    checkpoint.config["data"].update(data)
    return checkpoint


def test_the_main_network_is_the_first():
    assert list(networks_in(str(V01 / "export"))) == ["discriminator", "generator"]
    assert networks_in(str(V01 / "export")) == BOTH


def test_data_settings_and_versions(tmp_path):
    meta = json.loads((V01 / "shards/meta.json").read_text())
    counts = {"documents": 7, "text_bytes": 70, "tokens": 1234}
    meta["sources"] = {"/home/me/secret/books": counts, "Skylion007/openwebtext": counts}
    meta["conversion"]["sources"] = [
        {"path": "/home/me/secret/books"},
        {"path": "hub", "dataset": "Skylion007/openwebtext"},
    ]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a/meta.json").write_text(json.dumps(meta))
    checkpoint = checkpoint_of(path="", streams={name: {"path": str(tmp_path / name)} for name in "ab"})
    checkpoint.config["model"]["init_from"] = "google/electra-small-discriminator"
    card = ModelCard(build_card(BOTH, checkpoint))
    assert str(tmp_path) not in card.content
    assert "secret" not in card.content
    assert TAG in card.data.tags
    assert card.data.datasets == ["Skylion007/openwebtext"]
    lines = [" ".join(line.split()) for line in card.text.splitlines()]
    for row in ("a | books | 7 | 1,234", "a | Skylion007/openwebtext | 7 | 1,234", "b | (not known here) | |"):
        assert f"| {row} |" in lines
    assert "step 4, after 32 rows of at most 32 tokens: 822 tokens, without padding" in card.text
    assert "started from the weights of google/electra-small-discriminator" in card.text
    settings = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert settings["optimizer"] == checkpoint.config["optimizer"]
    assert settings["model"]["init_from"] == "google/electra-small-discriminator"
    assert f"electra_composer {__version__}" in card.text
    assert build_card(BOTH, checkpoint) == card.content  # the same bytes again


def test_a_run_with_one_network():
    card = build_card({"model": "ElectraForMaskedLM"}, checkpoint_of(), repository="me/mlm")
    assert 'model = ElectraForMaskedLM.from_pretrained("me/mlm")' in card
    assert "Replaced-token" in card  # of what its objective is, not of how many networks there are
    checkpoint = checkpoint_of()
    checkpoint.config["objective"] = {"kind": "mlm"}
    assert "Replaced-token" not in build_card({"masked_lm": "ElectraForMaskedLM"}, checkpoint)
