"""Checkpoints of google-research/electra and of richarddwang/electra_pytorch: values, sizes, names, and damaged files.

`tests/data/tensorflow` was written by TensorFlow (its `make.py`).
"""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import ROOT
from transformers import ElectraForMaskedLM, ElectraForPreTraining

from electra_composer.checkpoints.initial import initialise, read_initial
from electra_composer.checkpoints.networks import matching_generator, read_discriminator, read_generator
from electra_composer.checkpoints.reference_formats import infer_config, is_reference, read_reference
from electra_composer.checkpoints.tensorflow_files import find_checkpoint, read_variables
from electra_composer.checkpoints.weights import load_source, special_ids
from electra_composer.config import ModelConfig, ObjectiveConfig
from electra_composer.errors import UserError
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.finetuning import ElectraForClassification
from electra_composer.model.weight_maps import discriminator_to_transformers, generator_to_transformers

TENSORFLOW = ROOT / "tests" / "data" / "tensorflow"
VALUES = np.load(TENSORFLOW / "values.npz")
PREFIX = str(TENSORFLOW / "model.ckpt-7")
PARTS = ("index", "data-00000-of-00001")


@pytest.fixture(autouse=True)
def _forget_sources() -> None:
    read_initial.cache_clear()


def test_variables_are_those_that_tensorflow_wrote() -> None:
    found = read_variables(PREFIX)
    assert found.keys() == set(VALUES.files)
    for name, values in found.items():
        assert values.dtype == VALUES[name].dtype
        np.testing.assert_array_equal(values, VALUES[name])


@pytest.mark.parametrize("name", ["", "checkpoint", "model.ckpt-7", *(f"model.ckpt-7.{part}" for part in PARTS)])
def test_a_checkpoint_is_found_by_its_folder_and_by_its_files(name: str, tmp_path: Path) -> None:
    if name == "checkpoint":  # without the file that names the newest
        shutil.copytree(TENSORFLOW, tmp_path / "copy")
        (tmp_path / "copy" / "checkpoint").unlink()
        assert find_checkpoint(str(tmp_path / "copy")) == str(tmp_path / "copy" / "model.ckpt-7")
    else:
        assert find_checkpoint(str(TENSORFLOW / name)) == PREFIX
    assert find_checkpoint(str(tmp_path)) is None
    assert not is_reference(str(tmp_path))


def test_googles_networks_are_those_of_transformers() -> None:
    """Names, and the transposition of matrices: a dense layer of TensorFlow is x @ kernel + bias."""
    reference = read_reference(str(TENSORFLOW))
    for state, model_class, unused in (
        (reference.discriminator, ElectraForPreTraining, set()),
        (reference.generator, ElectraForMaskedLM, {"generator_lm_head.weight"}),
    ):
        model = model_class(infer_config(state, "x"))
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert set(missing) - {"electra.embeddings.position_ids"} == unused
        assert not unexpected
    config = infer_config(reference.discriminator, "x")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (16, 2, 1)
    assert (config.embedding_size, config.intermediate_size, config.max_position_embeddings) == (8, 64, 12)
    kernel = VALUES["electra/encoder/layer_1/intermediate/dense/kernel"]
    x = torch.randn(3, 16)
    weight = reference.discriminator["electra.encoder.layer.1.intermediate.dense.weight"]
    torch.testing.assert_close(torch.nn.functional.linear(x, weight), x @ torch.from_numpy(kernel))
    bias = reference.generator["generator_lm_head.bias"]
    np.testing.assert_array_equal(bias.numpy(), VALUES["generator_predictions/output_bias"])
    assert reference.tokenizer is not None
    assert len(reference.tokenizer) == 20


def test_pretraining_starts_from_googles_checkpoint() -> None:
    initial = read_initial(str(TENSORFLOW), None)
    assert initial is not None
    sizes = initial.sizes()
    assert (sizes["generator_size"], sizes["sharing"]) == (0.5, "tied")
    model, tokenizer = ModelConfig(**sizes), initial.discriminator.tokenizer  # type: ignore[union-attr]
    assert tokenizer is not None
    built = ElectraForPretraining(model, ObjectiveConfig(), 20, special_ids(tokenizer), 12)
    said = initialise(built, model, tokenizer, initial)
    assert said == f"discriminator from {TENSORFLOW}; generator from {TENSORFLOW}"
    reference = read_reference(str(TENSORFLOW))
    back = discriminator_to_transformers(built.state_dict(), built.discriminator.config)
    for name, tensor in reference.discriminator.items():
        assert torch.equal(back[name], tensor), name
    back = generator_to_transformers(built.state_dict(), built.encoder_of_generator.config)
    for name, tensor in reference.generator.items():
        assert torch.equal(back[name], tensor), name


def test_finetuning_starts_from_googles_checkpoint() -> None:
    source = load_source(str(TENSORFLOW))
    classifier = ElectraForClassification(source.encoder, 2)
    assert classifier.load_state_dict(source.weights, strict=False).missing_keys == ["head.weight", "head.bias"]
    kernel = torch.from_numpy(VALUES["electra/encoder/layer_0/output/dense/kernel"])
    assert torch.equal(classifier.encoder.layers[0].down.weight, kernel.T)
    assert source.rtd_head is not None
    assert len(source.tokenizer) == 20


def save_fastai(path: Path, with_optimizer: bool) -> tuple[ElectraForPreTraining, ElectraForMaskedLM]:
    """Save two networks with shared embeddings as `Learner.save` of fastai saves electra_pytorch's model."""
    reference = read_reference(str(TENSORFLOW))
    discriminator = ElectraForPreTraining(infer_config(reference.discriminator, "x"))
    generator = ElectraForMaskedLM(infer_config(reference.generator, "x"))
    discriminator.electra.embeddings = generator.electra.embeddings
    model = torch.nn.ModuleDict({"generator": generator, "discriminator": discriminator}).state_dict()
    optimizer = {"state": [{"step": 3, "grad_avg": torch.ones(2)}], "hypers": [{"lr": 5e-4, "mom": 0.9}]}
    torch.save({"model": model, "opt": optimizer} if with_optimizer else model, path)
    return discriminator, generator


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_the_seeds_file(tmp_path: Path, with_optimizer: bool) -> None:
    path = tmp_path / "vanilla_11081_100.0%.pth"
    discriminator, generator = save_fastai(path, with_optimizer)
    initial = read_initial(str(path), None)
    assert initial is not None
    model, tokenizer = ModelConfig(**initial.sizes()), read_reference(str(TENSORFLOW)).tokenizer
    assert tokenizer is not None
    built = ElectraForPretraining(model, ObjectiveConfig(), 20, special_ids(tokenizer), 12)
    said = initialise(built, model, tokenizer, initial)
    assert f"discriminator from {path}, which has no vocabulary to compare with the shards'; generator" in said
    back = discriminator_to_transformers(built.state_dict(), built.discriminator.config)
    for name, tensor in discriminator.state_dict().items():
        assert torch.equal(back[name], tensor), name
    back = generator_to_transformers(built.state_dict(), built.encoder_of_generator.config)
    for name, tensor in generator.state_dict().items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"layer.weight": torch.ones(2)}}, r"not a \.pth file of electra_pytorch: expected weights discrim"),
        ([1, 2], r"not a \.pth file of electra_pytorch: it holds no state dict"),
        ({"model": {"generator.a": torch.ones(1), "discriminator.a": torch.ones(1)}}, "holds no ELECTRA network"),
    ],
)
def test_another_file_of_fastai(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        read_discriminator(str(tmp_path / "x.pth"))


def test_damaged_checkpoints_of_tensorflow_are_refused(tmp_path: Path) -> None:
    """Cut short, bytes changed, and files gone: the values are read right, or there is one line."""
    files = {path.name: path.read_bytes() for path in TENSORFLOW.glob("model*")}
    index, data = "model.ckpt-7.index", "model.ckpt-7.data-00000-of-00001"
    dice = random.Random(0)
    spoilt = [{**files, name: files[name][: int(len(files[name]) * part)]} for name in files for part in (0, 0.3, 0.99)]
    for _ in range(200):
        place = dice.randrange(len(files[index]))
        changed = bytearray(files[index])
        changed[place] ^= 1 << dice.randrange(8)
        spoilt.append({**files, index: bytes(changed)})
    refused = 0
    for contents in spoilt:
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        try:
            read_variables(str(tmp_path / "model.ckpt-7"))
        except UserError as error:
            refused += re.fullmatch(r".*: not a readable checkpoint of TensorFlow, or .*", str(error)) is not None
    assert refused > len(spoilt) / 4  # other bits are in names, checksums and shapes
    (tmp_path / data).unlink()
    (tmp_path / index).write_bytes(files[index])
    with pytest.raises(UserError, match=r"data-00000-of-00001: no such file, but it is a part of the checkpoint"):
        read_variables(str(tmp_path / "model.ckpt-7"))


def test_a_checkpoint_without_a_generator(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    save_fastai(path, with_optimizer=True)
    assert matching_generator(str(path)) == str(path)
    assert matching_generator(str(TENSORFLOW)) == str(TENSORFLOW)
    assert read_generator(str(TENSORFLOW)).config.hidden_size == 8


@pytest.mark.parametrize(
    ("source", "generator"),
    [
        ("google/electra-small-discriminator", "google/electra-small-generator"),
        ("google/electra-large-discriminator", "google/electra-large-generator"),
        ("somebody/medical-electra", None),
        ("runs/one/latest-rank0.pt", "runs/one/latest-rank0.pt"),
    ],
)
def test_where_the_generator_of_a_discriminator_is(source: str, generator: str | None) -> None:
    assert matching_generator(source) == generator
