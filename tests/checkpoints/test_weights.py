"""Checkpoints and pretrained weights load strictly; missing, truncated, foreign and malicious files are refused."""

from __future__ import annotations

import json
import os
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast, ElectraConfig, ElectraForPreTraining

from electra_composer.checkpoints.weights import check_state_fits, load_source, read_checkpoint
from electra_composer.config import ModelConfig
from electra_composer.errors import UserError
from electra_composer.model.finetuning import ElectraForClassification

Make = Callable[..., Any]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(94))]  # 99


def test_a_state_must_fit_exactly(make_model: Make, tiny_model_config: Make) -> None:
    expected = make_model().state_dict()
    check_state_fits(make_model(seed=1).state_dict(), expected, "x.pt")
    deeper = make_model(tiny_model_config(num_layers=3)).state_dict()
    with pytest.raises(UserError, match=r"x\.pt: weights of another model: \d+ unexpected"):
        check_state_fits(deeper, expected, "x.pt")
    with pytest.raises(UserError, match=r"\d+ missing, such as discriminator\.layers\.2"):
        check_state_fits(expected, deeper, "x.pt")
    wider = make_model(vocab_size=200).state_dict()
    with pytest.raises(UserError, match=r"has shape \[256.*\], this model expects \[128.*\]"):
        check_state_fits(wider, expected, "x.pt")


# Checkpoints of pretrain.py


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def content_of(state: dict[str, torch.Tensor], tokenizer_files: dict[str, str], config: ModelConfig) -> dict[str, Any]:
    """Return the parts of a Composer checkpoint that are read."""
    record = {"config": {"model": dict(vars(config))}, "tokenizer_files": tokenizer_files}
    return {"state": {"model": {f"model.{n}": t for n, t in state.items()}, "callbacks": {"RunRecord": record}}}


@pytest.fixture
def checkpoint(
    tmp_path: Path, make_model: Make, tiny_model_config: Make, tokenizer_files: dict[str, str]
) -> tuple[Path, dict[str, torch.Tensor]]:
    state = make_model().state_dict()
    path = tmp_path / "latest-rank0.pt"
    torch.save(content_of(state, tokenizer_files, tiny_model_config()), path)
    return path, state


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_checkpoint_of_ours(
    checkpoint: tuple[Path, dict[str, torch.Tensor]], make_model: Make, as_folder: bool
) -> None:
    """Read from the file or from its run folder."""
    path, state = checkpoint
    found = read_checkpoint(str(path.parent if as_folder else path))
    assert found.state.keys() == state.keys()
    assert all(torch.equal(found.state[name], state[name]) for name in state)
    assert found.discriminator == make_model().discriminator.config
    assert found.generator == make_model().generator.config
    assert found.tokenizer.convert_tokens_to_ids(["[MASK]", "w0"]) == [4, 5]


def test_a_checkpoint_of_a_compiled_model(tmp_path: Path, make_model: Make, checkpoint: Any) -> None:
    path, state = checkpoint
    content = torch.load(path)
    model = {name.replace("model.", "model._orig_mod.", 1): t for name, t in content["state"]["model"].items()}
    content["state"]["model"] = model
    torch.save(content, tmp_path / "compiled.pt")
    assert read_checkpoint(str(tmp_path / "compiled.pt")).state.keys() == state.keys()


def test_the_discriminator_of_a_checkpoint_fits_the_classifier(checkpoint: tuple[Path, Any], make_batch: Make) -> None:
    """Only the head is missing, and nothing is unexpected."""
    path, state = checkpoint
    source = load_source(str(path))
    classifier = ElectraForClassification(source.encoder, 2)
    missing, unexpected = classifier.load_state_dict(source.weights, strict=False)
    assert missing == ["head.weight", "head.bias"]
    assert unexpected == []
    assert torch.equal(classifier.encoder.layers[1].up.weight, state["discriminator.layers.1.up.weight"])


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["torch", "torch_legacy", "pickle", "beside the weights"])
def test_a_pickle_that_would_run_code_does_not_run(checkpoint: tuple[Path, Any], tmp_path: Path, how: str) -> None:
    ran, path = tmp_path / "ran", tmp_path / "evil.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Evil(ran)))
    elif how == "beside the weights":
        torch.save({**torch.load(checkpoint[0]), "rng": [Evil(ran)]}, path)
    else:
        torch.save({"state": Evil(ran)}, path, _use_new_zipfile_serialization=how == "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the pickle protocol
        with pytest.raises(UserError, match="not loaded, since that could run"):
            read_checkpoint(str(path))
        assert not ran.exists()
        if how == "torch":  # check of the test itself: unsafe loading runs it
            torch.load(path, weights_only=False)
            assert ran.exists()


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_cut_checkpoint(checkpoint: tuple[Path, Any], tmp_path: Path, fraction: float) -> None:
    intact = checkpoint[0].read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(intact[: int(len(intact) * fraction)])
    assert_refused(path, "its end is missing" if fraction else "an empty file")


def assert_refused(path: Path, message: str, read: Callable[[str], Any] = read_checkpoint) -> None:
    """Assert that reading fails with one line that begins with the path."""
    with pytest.raises(UserError, match=message) as caught:
        read(str(path))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_no_such_checkpoint(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.pt", "no such file or folder; expected a checkpoint of pretrain.py: a .pt file, ")
    assert_refused(tmp_path, "an empty folder; expected a checkpoint of pretrain.py: a .pt file, the folder of a shard")


def test_bytes_of_another_kind(tmp_path: Path) -> None:
    """Text and 300 files of random bytes: each is refused with one line instead of a traceback."""
    path = tmp_path / "foreign.pt"
    dice = random.Random(0)
    foreign = [b"hello world\n" * 10, b"PK\x03\x04" + dice.randbytes(500), b"{}"]
    foreign += [dice.randbytes(dice.randint(1, 60)) for _ in range(300)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for content in foreign:
            path.write_bytes(content)
            assert_refused(path, "expected a checkpoint of pretrain.py")


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(3),
        [1, 2],
        "text",
        None,
        {"weight": torch.ones(2)},
        {"state": {"model": {"model.x": torch.ones(1)}}},
        {"state": {"model": {}, "callbacks": {"RunRecord": {}}}},
        {"state": {"model": {}, "callbacks": {"RunRecord": None}}},
        {"state": {"model": 3, "callbacks": {"RunRecord": {"config": {}, "tokenizer_files": {}}}}},
    ],
)
def test_a_file_of_torchs_that_is_no_checkpoint_of_ours(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pt")
    assert_refused(tmp_path / "other.pt", "saved by another program.*; expected a checkpoint of pretrain.py")


def test_a_checkpoint_without_its_tokenizer(tmp_path: Path, make_model: Make, tiny_model_config: Make) -> None:
    torch.save(content_of(make_model().state_dict(), {"notes.txt": "x"}, tiny_model_config()), tmp_path / "x.pt")
    assert_refused(tmp_path / "x.pt", "tokenizer")


def test_tokenizer_files_stay_in_their_folder(
    tmp_path: Path, make_model: Make, tiny_model_config: Make, tokenizer_files: dict[str, str]
) -> None:
    """A file name in a checkpoint cannot lead out of the temporary folder."""
    outside = tmp_path / "outside.txt"
    files = {**tokenizer_files, str(outside): "x", "../../outside.txt": "x"}
    torch.save(content_of(make_model().state_dict(), files, tiny_model_config()), tmp_path / "x.pt")
    read_checkpoint(str(tmp_path / "x.pt"))
    assert not outside.exists()


# Sources in the format of transformers

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}


@pytest.fixture
def hugging_face(tmp_path: Path, tokenizer_files: dict[str, str]) -> Callable[..., Path]:
    """Return `hugging_face(**changes)`, which writes a folder with model and tokenizer."""

    def make(model: Any = ElectraForPreTraining, config: Any = ElectraConfig, **changes: Any) -> Path:
        folder = tmp_path / "source"
        model(config(**{**SIZES, **changes})).save_pretrained(folder)
        for name, text in tokenizer_files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return folder

    return make


def test_a_hugging_face_folder(hugging_face: Callable[..., Path], make_batch: Make) -> None:
    """Hidden states equal those of transformers."""
    folder = hugging_face(embedding_size=8)
    source = load_source(str(folder))
    ours = ElectraForClassification(source.encoder, 2).eval()
    assert ours.load_state_dict(source.weights, strict=False).missing_keys == ["head.weight", "head.bias"]
    theirs = ElectraForPreTraining.from_pretrained(folder).eval()
    batch = make_batch([[(6, 4)], [(12, 0)]], length=16)
    present = (batch["sequence_ids"] > 0).long()
    seen: list[torch.Tensor] = []
    ours.encoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        ours(**batch)
        expected = theirs.electra(batch["input_ids"], present, batch["token_type_ids"]).last_hidden_state
    torch.testing.assert_close(seen[0][present > 0], expected[present > 0], rtol=1e-5, atol=1e-5)


def test_no_source(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.pt", "no such file or folder", load_source)
    assert_refused(tmp_path / "nothing_here", "no such file or folder", load_source)
    with pytest.raises(UserError, match="neither a checkpoint, nor a Hugging Face folder"):
        load_source("nobody/nothing")
    assert_refused(tmp_path, "neither latest-rank0.pt .* nor config.json", load_source)


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _bad_json(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")


def _other_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 32}), encoding="utf-8")


def _no_tokenizer(folder: Path) -> None:
    for path in folder.iterdir():
        if "token" in path.name or "vocab" in path.name:
            path.unlink()


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("spoil", [_cut, _bad_json, _other_sizes, _no_tokenizer, _no_weights])
def test_a_spoilt_hugging_face_folder(hugging_face: Callable[..., Path], spoil: Callable[[Path], None]) -> None:
    folder = hugging_face()
    spoil(folder)
    assert_refused(folder, "neither a checkpoint, nor a Hugging Face folder", load_source)


def test_a_hugging_face_pickle_that_would_run_code_does_not_run(
    hugging_face: Callable[..., Path], tmp_path: Path
) -> None:
    folder = hugging_face()
    _no_weights(folder)
    torch.save({"electra.weight": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    assert_refused(folder, "neither", load_source)
    assert not (tmp_path / "ran").exists()


def test_another_architecture(hugging_face: Callable[..., Path]) -> None:
    folder = hugging_face(model=BertForMaskedLM, config=BertConfig)
    assert_refused(folder, "not an ELECTRA discriminator", load_source)


def test_a_tokenizer_larger_than_the_embeddings(hugging_face: Callable[..., Path]) -> None:
    """Its last tokens would have no embedding."""
    assert_refused(hugging_face(vocab_size=50), "tokenizer has 99 tokens, its model embeddings for 50", load_source)
