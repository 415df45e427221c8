"""Recognize models and checkpoints of other programs, to say what they are and how to bring them in."""

from __future__ import annotations

import contextlib
import json
import os
import pickletools
import zipfile

from electra_composer.errors import UserError

START_FROM_IT = "model.init_from of pretrain.py (docs/continued_pretraining.md) and model.source of glue.py take it"
EXPORTED_AS, MASKED_LM = "electra_composer_network", "masked_lm"  # in config.json: a discriminator that predicts tokens
HF_FOLDER = "a Hugging Face folder (config.json, model.safetensors and a tokenizer)"
RUN_RESULTS = {"results.json", "runs.jsonl"}
TENSORFLOW = (".index", ".meta", ".data-00000-of-00001")
# Formats by the name of a file.
SUFFIXES = {
    ".h5": "an HDF5 file (Keras, TensorFlow 2)",
    ".msgpack": "weights of Flax",
    ".gguf": "a GGUF file (llama.cpp)",
    ".onnx": "an ONNX file",
    ".zip": "a zip archive",
    ".tar": "a tar archive",
    ".gz": "a gzip archive",
    ".tgz": "a gzip archive",
    ".ckpt": "a checkpoint of PyTorch Lightning or TensorFlow",
}
# Weights in a folder of transformers that need another library, where there are none of PyTorch.
FOREIGN_WEIGHTS = {"tf_model.h5": ("TensorFlow", "from_tf"), "flax_model.msgpack": ("Flax", "from_flax")}
PICKLE_BYTES = 1 << 24  # of a pickle that are searched for names of weights


def refuse_foreign(path: str, wanted: str) -> None:
    """Refuse what another program wrote.

    Args:
        wanted: what is expected instead, such as `a checkpoint of pretrain.py`.

    Raises:
        UserError: what it is, and how to bring it in.
    """
    found = describe_foreign(path)
    if found is not None:
        raise UserError(f"{path}: {found}; expected {wanted}")


def describe_foreign(path: str) -> str | None:
    """Describe a model or checkpoint of another program, and how to bring it in.

    No code in the file is run: pickles are searched for names of weights, not loaded.

    Returns:
        None for anything else: what this program reads, what does not exist, and what is not known.
    """
    try:
        if _is_tensorflow(path):
            return f"a TensorFlow checkpoint (google-research/electra?); {START_FROM_IT}"
        if os.path.isdir(path):
            return _describe_folder(path)
        return _describe_file(path) if os.path.isfile(path) else None
    except OSError:
        return None  # not readable: reported where it is read


def _is_tensorflow(path: str) -> bool:
    if os.path.isdir(path):
        names = os.listdir(path)
        indices = [name for name in names if name.endswith(".index")]
        return bool(indices) and ("checkpoint" in names or any(".ckpt" in name for name in indices))
    return os.path.isfile(f"{path}.index") or (path.endswith(TENSORFLOW) and os.path.isfile(path))


def _describe_folder(path: str) -> str | None:
    names = set(os.listdir(path))
    if "meta.json" in names and "config.json" not in names:
        return "a folder of shards, not of a model"
    if names >= RUN_RESULTS:
        return (
            "a run of finetune.py or glue.py, not a model; the models of finetune.py are folders of transformers below "
            f"{os.path.join(path, 'models')}, in results.json the best first"
        )
    if "adapter_config.json" in names:
        return "an adapter (PEFT) without the model's own weights; merge it into its model and save that"
    if "config.json" not in names:
        return None
    for name, (library, option) in FOREIGN_WEIGHTS.items():
        if name in names and not names & {"model.safetensors", "pytorch_model.bin"} and not _has_index(names):
            return (
                f"a Hugging Face folder with weights of {library} only; load it with transformers' "
                f"from_pretrained(…, {option}=True), which needs {library}, and save it again by save_pretrained"
            )
    with contextlib.suppress(ValueError, AttributeError):
        with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        kind, architectures = config.get("model_type"), config.get("architectures") or ["?"]
        if kind not in (None, "electra"):
            return f"a model of the kind {kind} ({architectures[0]}), not an ELECTRA discriminator"
        if architectures == ["ElectraForMaskedLM"] and config.get(EXPORTED_AS) != MASKED_LM:
            return "an ELECTRA generator (ElectraForMaskedLM), not a discriminator"
    return None


def _has_index(names: set[str]) -> bool:
    return any(name.endswith((".safetensors.index.json", ".bin.index.json")) for name in names)


def _describe_file(path: str) -> str | None:
    if path.endswith(".safetensors") or os.path.basename(path) == "pytorch_model.bin":
        return f"a file of weights without its model's sizes and tokenizer; give its folder: {HF_FOLDER}"
    names = _names_in_pickle(path)
    if "opt" in names and any(name.startswith("discriminator.") for name in names):
        return (
            "a checkpoint of richarddwang/electra_pytorch ({'model': {'generator.…', 'discriminator.…'}, 'opt'}); "
            f"{START_FROM_IT}"
        )
    kind = SUFFIXES.get(os.path.splitext(path)[1].lower())
    return None if kind is None else f"{kind}, which is not read here"


def _names_in_pickle(path: str) -> set[str]:
    """Return the texts in the pickles of a file of `torch.save`, old or new; empty for other files."""
    names: set[str] = set()
    try:
        content = _pickles(path)
        while content:  # the old format has several pickles, and then the values of the tensors
            for opcode, argument, position in pickletools.genops(content):
                if isinstance(argument, str) and "UNICODE" in opcode.name:
                    names.add(argument)
                if opcode.name == "STOP":
                    end = (position or 0) + 1
            content = content[end:]
    except (ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, zipfile.BadZipFile):
        pass  # truncated, or the values have begun: what was found is enough
    return names


def _pickles(path: str) -> bytes:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            return b"" if name is None else archive.open(name).read(PICKLE_BYTES)
    with open(path, "rb") as file:
        return file.read(PICKLE_BYTES) if file.read(1) == b"\x80" and not file.seek(0) else b""
