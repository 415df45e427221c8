"""Models and checkpoints of other programs are recognized and named, wherever they are given as a source."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch
from small_shards import make_tokenizer, write_shards

from electra_composer.checkpoints.weights import load_source, read_checkpoint
from electra_composer.errors import UserError
from electra_composer.foreign_files import describe_foreign
from electra_composer.vocabulary import load_tokenizer

WEIGHTS = {"generator.electra.embeddings.w": torch.zeros(2), "discriminator.electra.embeddings.w": torch.zeros(2)}


def tensorflow_folder(folder):
    for name in ("checkpoint", "model.ckpt-10.index", "model.ckpt-10.meta", "model.ckpt-10.data-00000-of-00001"):
        (folder / name).write_bytes(b"\0")
    return folder


def tensorflow_prefix(folder):
    return tensorflow_folder(folder) / "model.ckpt-10"


def tensorflow_file(folder):
    return tensorflow_folder(folder) / "model.ckpt-10.data-00000-of-00001"


def electra_pytorch(folder):
    torch.save({"model": WEIGHTS, "opt": {"hypers": [], "state": []}}, folder / "vanilla_1_12.0%.pth")
    return folder / "vanilla_1_12.0%.pth"


def electra_pytorch_of_old_torch(folder):
    path = folder / "old.pth"
    torch.save({"model": WEIGHTS, "opt": {"state": []}}, path, _use_new_zipfile_serialization=False)
    return path


def file_of(name, content):
    def write(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return write


def zip_archive(folder):
    with zipfile.ZipFile(folder / "model.zip", "w") as archive:
        archive.writestr("config.json", "{}")
    return folder / "model.zip"


def folder_of(config, *names):
    def write(folder):
        (folder / "config.json").write_text(json.dumps(config))
        for name in names:
            (folder / name).write_bytes(b"\0")
        return folder

    return write


BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
ROBERTA = {"model_type": "roberta", "architectures": ["RobertaModel"]}
ELECTRA = {"model_type": "electra", "architectures": ["ElectraForPreTraining"]}
MODELS = [
    (tensorflow_folder, "a TensorFlow checkpoint"),
    (tensorflow_prefix, "a TensorFlow checkpoint"),
    (tensorflow_file, "a TensorFlow checkpoint"),
    (electra_pytorch, "a checkpoint of richarddwang/electra_pytorch"),
    (electra_pytorch_of_old_torch, "a checkpoint of richarddwang/electra_pytorch"),
    (file_of("tf_model.h5", b"\x89HDF\r\n\x1a\n..."), "an HDF5 file"),
    (file_of("flax_model.msgpack", b"\x81"), "weights of Flax"),
    (file_of("model.gguf", b"GGUF\x03"), "a GGUF file"),
    (file_of("model.onnx", b"\x08\x07"), "an ONNX file"),
    (file_of("model.tar.gz", b"\x1f\x8b\x08"), "a gzip archive"),
    (file_of("model.safetensors", b"\x08\0\0\0\0\0\0\0{}"), "give its folder"),
    (file_of("pytorch_model.bin", b"PK"), "give its folder"),
    (zip_archive, "a zip archive"),
    (folder_of(ELECTRA, "tf_model.h5"), "weights of TensorFlow only"),
    (folder_of(ELECTRA, "flax_model.msgpack"), "weights of Flax only"),
    (folder_of({**ELECTRA, "architectures": ["ElectraForMaskedLM"]}, "model.safetensors"), "an ELECTRA generator"),
    (folder_of(BERT, "model.safetensors"), "a model of the kind bert (BertForMaskedLM)"),
    (folder_of(ROBERTA, "pytorch_model.bin"), "a model of the kind roberta (RobertaModel)"),
    (folder_of({}, "adapter_config.json"), "an adapter (PEFT)"),
]


READ_FOR_FINETUNING = (
    tensorflow_folder,
    tensorflow_prefix,
    tensorflow_file,
    electra_pytorch,
    electra_pytorch_of_old_torch,
)


@pytest.mark.parametrize(("write", "words"), MODELS)
def test_models_of_other_programs_are_named(tmp_path, write, words):
    path = str(write(tmp_path))
    readable = write in READ_FOR_FINETUNING
    for read in (read_checkpoint,) if readable else (load_source, read_checkpoint):
        with pytest.raises(UserError) as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert words in message
        assert "expected a checkpoint of pretrain.py" in message
        assert ("model.init_from" in message) == ("TensorFlow checkpoint" in words or "electra_pytorch" in words)
        assert "\n" not in message


@pytest.mark.parametrize(("write", "words"), MODELS[1:13])
def test_as_a_tokenizer(tmp_path, write, words):
    with pytest.raises(UserError, match=r"expected a vocab\.txt") as caught:
        load_tokenizer(str(write(tmp_path)))
    assert words in str(caught.value)


def test_shards_are_no_model(tmp_path):
    shards = write_shards(tmp_path / "out", make_tokenizer(tmp_path), train=2, val=1)
    assert describe_foreign(shards) == "a folder of shards, not of a model"


def test_a_run_of_finetuning_is_no_model(tmp_path):
    for name in ("results.json", "runs.jsonl"):
        (tmp_path / name).write_text("{}")
    for read in (load_source, read_checkpoint):
        with pytest.raises(
            UserError, match=r"a run of finetune\.py or glue\.py, not a model; .*models, in results\.json"
        ):
            read(str(tmp_path))


def test_what_is_read_here_is_not_foreign(tmp_path):
    (tmp_path / "electra").mkdir()
    assert describe_foreign(str(folder_of(ELECTRA, "model.safetensors")(tmp_path / "electra"))) is None
    torch.save({"state": {"model": {"discriminator.w": torch.zeros(1)}}}, tmp_path / "ba1.pt")
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    for name in ("ba1.pt", "vocab.txt", "nothing", "google/electra-small-discriminator"):
        assert describe_foreign(str(tmp_path / name)) is None
    for content in (b"", b"\x80", b"\x80\x05", b"PK\x03\x04", b"\x80\x02X\xff\xff\xff\x7f", b"\xff" * 100):
        (tmp_path / "x.pt").write_bytes(content)
        assert describe_foreign(str(tmp_path / "x.pt")) is None
