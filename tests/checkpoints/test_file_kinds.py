"""A file or folder that is no checkpoint is described in one plain line, wherever it is given as one."""

from __future__ import annotations

import gzip
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import ROOT, TINY_YAML

from electra_composer import export
from electra_composer.checkpoints.weights import load_source, read_checkpoint
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.training.preparation import read_initial_checkpoint

GOOD = ROOT / "tests" / "data" / "v0.1" / "run" / "batch-4-rank0.pt"
OBJECTS = "it was not loaded, since that could run code in"


class Evil:
    """Makes the file `ran` when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def write(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(GOOD.read_bytes()[:-1000])


def saved(content: Any, **options: Any) -> Callable[[Path], Any]:
    return lambda path: torch.save(content, path, **options)


def dumped(content: Any) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(pickle.dumps(content))


def archive(*names: str) -> Callable[[Path], Any]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, "x")

    return make


def folder(**files: bytes) -> Callable[[Path], Any]:
    def make(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)

    return make


def script(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


# Kind → how to make it, and what is said of it.
KINDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (cut, "a truncated checkpoint or zip archive: its end is missing"),
    "first bytes": (write(GOOD.read_bytes()[:10]), "a truncated checkpoint or zip archive"),
    "empty": (write(b""), "an empty file"),
    "zeros": (write(bytes(5000)), "begins with zero bytes, as after a power cut"),
    "text": (write("Größe\n".encode() * 1000), "a text file"),
    "web page": (write(b"<!DOCTYPE html><html>404</html>"), "a web page"),
    "git lfs": (write(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "git lfs pull"),
    "gzip": (write(gzip.compress(b"x" * 999)), "a gzip archive"),
    "bytes": (write(bytes(range(255, 0, -1)) * 20), "a file of another format, or a damaged one"),
    "safetensors": (lambda path: save_file({"a": torch.ones(2)}, path), "a safetensors file"),
    "another zip": (archive("word/document.xml"), r"a zip archive of another program \(with word/document.xml\)"),
    "empty zip": (archive(), r"a zip archive of another program \(empty\)"),
    "plain objects": (dumped({"a": 1}), f"Python objects, .*{OBJECTS}"),
    "code": (dumped(Evil()), f"Python objects, .*{OBJECTS}"),
    "code in torch's format": (saved({"state": Evil()}), f"objects other than .*mkdir.*{OBJECTS}"),
    "module": (
        saved(torch.nn.Linear(2, 2)),
        f"objects other than .*torch.nn.modules.linear.Linear.*{OBJECTS}",
    ),
    "old torch": (
        saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False),
        "a version before 1.6",
    ),
    "torch script": (script, "a TorchScript archive"),
    "tensor": (saved(torch.ones(2)), "a Tensor saved by another program"),
    "list": (saved([1]), "a list saved by another program"),
    "weights": (saved({"a": 1, "b": torch.ones(2), "c": 3, "d": 4}), "saved by another program, with a, b, c …"),
    "of Composer": (saved({"state": {"model": {}, "callbacks": {}}}), "saved by another program, with state"),
    "half a record": (
        saved({"state": {"model": {}, "callbacks": {"RunRecord": {"config": {}, "tokenizer_files": {}}}}}),
        "saved by another program, with state",
    ),
    "empty folder": (folder(), "an empty folder|neither"),
    "folder": (folder(notes=b"x"), "neither"),
    "folder of parts": (folder(**{"__0_0.distcp": b"x"}), "a sharded checkpoint without its .metadata|neither"),
    "damaged metadata": (folder(**{".metadata": b"x"}), "(of which files are missing or|is incomplete or) damaged"),
    "code in metadata": (folder(**{".metadata": pickle.dumps(Evil())}), f"objects other than .*mkdir.*{OBJECTS}"),
    "broken link": (
        lambda path: path.symlink_to("gone.pt"),
        "gone.pt(, which)? is missing",
    ),
    "nothing": (lambda path: None, "no such file or folder|is missing"),
}
WHAT_TO_GIVE = "expected a checkpoint of pretrain.py|give one of them|nor config.json|copy one there"
JARGON = r"(?i)pickle|mmap|weights_only\b(?!=)|torch\.load|\w+Error\b|global\b|NoneType|PytorchStreamReader|load key"


@pytest.fixture
def entries(tmp_path: Path) -> dict[str, Callable[[Path], Any]]:
    """The places where a checkpoint is given."""
    yaml = tmp_path / "tiny.yaml"
    yaml.write_text(TINY_YAML.replace("SHARDS", "none").replace("FOLDER", str(tmp_path / "run")))

    def initial(*overrides: str) -> Any:
        return read_initial_checkpoint(load_config(str(yaml), list(overrides), PretrainConfig))

    def own(path: Path) -> Any:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "latest-rank0.pt").symlink_to(path)
        return initial()

    return {
        "export, preview": lambda path: read_checkpoint(str(path)),
        "model.source": lambda path: load_source(str(path)),
        "checkpoints.load_path": lambda path: initial(f"checkpoints.load_path={path}"),
        "run folder": own,
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_at_each_place(entries, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, expected = KINDS[kind]
    path = tmp_path / "batch-4-rank0.pt"
    make(path)
    for place, read in entries.items():
        with pytest.raises(UserError) as error:
            read(path)
        message = str(error.value)
        assert re.search(expected, message), (place, message)
        assert os.path.realpath(path) in message or str(path) in message, (place, message)
        assert re.search(WHAT_TO_GIVE, message), (place, message)
        assert not re.search(JARGON, message.replace("load_weights_only", "")), (place, message)
        assert "\n" not in message
        assert len(message) < 600
    assert not (tmp_path / "ran").exists()


def test_a_good_one_is_read(entries):
    """Check of the test itself; the configuration of another model is refused by its key."""
    for place in ("export, preview", "model.source"):
        entries[place](GOOD)
    for place in ("checkpoints.load_path", "run folder"):
        with pytest.raises(UserError, match=r"was written with model\.hidden_size=16, "):
            entries[place](GOOD)


def test_export_ends_with_one_line(tmp_path, capsys):
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(SystemExit) as ended:
        export.main([str(tmp_path / "x.pt"), str(tmp_path / "out")])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/x.pt: an empty file; expected a checkpoint of pretrain.py: a .pt file, ")
