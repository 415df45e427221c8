"""Errors of a full disk are recognized, whichever library raises them."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from electra_composer import export
from electra_composer.disk import disk_error
from electra_composer.errors import UserError
from electra_composer.faults import explain

FULL = [
    OSError(errno.ENOSPC, "No space left on device", "name"),
    Exception("No space left on device (os error 28)"),  # tokenizers
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    SafetensorError('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left" })'),
]

NETWORK = export.Exported("discriminator", None, None, {})
CHECKPOINT = SimpleNamespace(state={}, tokenizer=None)


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk(error):
    assert disk_error(error) == "No space left on device"
    assert "could not be written: No space left on device; free some space" in explain(error)


@pytest.mark.parametrize("error", [None, ValueError("28"), OSError("x"), FileNotFoundError(errno.ENOENT, "missing")])
def test_other_errors(error):
    assert disk_error(error) is None


@pytest.mark.parametrize("error", [*FULL, Exception("Permission denied (os error 13)")])
def test_an_export_to_a_full_disk(tmp_path, monkeypatch, error):
    def full(*_):
        (tmp_path / "before").touch()
        raise error

    monkeypatch.setattr(export, "_save", full)
    monkeypatch.setattr(export, "networks_of", lambda checkpoint: [NETWORK])
    with pytest.raises(UserError, match=r"cannot write the export to .*(No space left|denied).*; nothing was kept"):
        export.export(CHECKPOINT, str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["before"]


def test_a_bug_in_an_export_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "networks_of", lambda checkpoint: [NETWORK])
    monkeypatch.setattr(export, "_save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.export(CHECKPOINT, str(tmp_path / "out"))
