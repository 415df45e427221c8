"""`electra doctor`: each fault of a machine has its line, its advice and its status."""

from __future__ import annotations

import importlib.metadata
import resource
import shutil
import socket
import subprocess
import threading
from collections import namedtuple
from collections.abc import Iterator

import pytest
import torch

from electra_composer import compilers, doctor
from electra_composer.doctor import OK, WARNING, WRONG, Finding

Usage = namedtuple("Usage", "total used free")


def found(check: str, subject: str) -> Finding:
    """Return the finding of a check about a subject."""
    (finding,) = (each for each in getattr(doctor, f"check_{check}")() if each.subject == subject)
    return finding


@pytest.mark.parametrize(
    ("version", "state", "text"),
    [
        ("2.7.0", OK, "2.7.0"),
        ("2.7.0+cpu", OK, "2.7.0+cpu"),
        ("2.6.0", WRONG, "2.6.0 is too old; expected at least 2.7.0: pip install"),
        ("2.8.0", WARNING, "2.8.0 is untested; tested: 2.7.0"),
        (None, WRONG, "not installed; pip install"),
    ],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, version: str | None, state: str, text: str) -> None:
    def installed(package: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    finding = found("versions", "PyTorch")
    assert finding.state == state
    assert str(finding).startswith(f"{state:8} PyTorch        {text}")


def test_a_driver_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "550.1\n550.1\n", ""))
    finding = found("gpus", "GPU")
    assert finding.state == WRONG
    assert "sees no GPU, although the driver 550.1 is there; install a torch built for CUDA" in str(finding)
    monkeypatch.setattr(doctor, "driver_version", lambda: None)
    assert found("gpus", "GPU").state == OK
    monkeypatch.setattr("electra_composer.training.devices.cpu_multiplies_bfloat16", lambda: False)
    assert found("gpus", "bfloat16").advice == "set trainer.precision=fp32"


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert doctor.driver_version() is None


@pytest.mark.parametrize(("has_gpu", "state"), [(True, WRONG), (False, WARNING)])
def test_no_compiler(monkeypatch: pytest.MonkeyPatch, has_gpu: bool, state: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(compilers, "missing_for_triton", lambda: "a C compiler (apt-get install gcc, or set CC)")
    finding = found("compilers", "Triton")
    assert finding.state == state
    assert finding.text == "lacks a C compiler (apt-get install gcc, or set CC)"


@pytest.mark.parametrize(("free", "shared", "disk"), [(2**24, WRONG, WRONG), (2**27, WARNING, WRONG), (2**36, OK, OK)])
def test_room(monkeypatch: pytest.MonkeyPatch, free: int, shared: str, disk: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 0, free))
    assert found("room", "/dev/shm").state == shared
    assert found("room", "disk").state == disk


@pytest.mark.parametrize(("limit", "state"), [(100, WRONG), (900, WARNING), (10**6, OK), (resource.RLIM_INFINITY, OK)])
def test_limits(monkeypatch: pytest.MonkeyPatch, limit: int, state: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    finding = found("limits", "open files")
    assert finding.state == state
    assert (finding.advice == "raise the limit: ulimit -n 65536") == (state != OK)


@pytest.fixture
def hub() -> Iterator[str]:
    """A server that refuses every request by 404: it answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_the_hub(monkeypatch: pytest.MonkeyPatch, hub: str) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub)
    assert found("hub", "hub") == Finding("hub", OK, f"{hub} answers")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    finding = found("hub", "hub")
    assert finding.state == WARNING
    assert "does not answer: [Errno 111] Connection refused" in finding.text
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert found("hub", "hub").text == "HF_HUB_OFFLINE is set"


def test_the_report_and_its_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def check_one() -> Iterator[Finding]:
        yield Finding("one", OK, "fine")
        yield Finding("two", WARNING, "odd", "look")

    def check_two() -> Iterator[Finding]:
        raise ImportError("libcudart.so: cannot open\nshared object")

    cause = "ImportError: libcudart.so: cannot open shared object"
    for checks, status in (((check_one,), 0), ((check_one, check_two), 1)):
        monkeypatch.setattr(doctor, "CHECKS", checks)
        with pytest.raises(SystemExit) as caught:
            doctor.main([])
        assert caught.value.code == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["ok       one            fine", "warning  two            odd; look"]
    assert (lines[3], lines[-1]) == ("0 wrong, 1 to know of", "1 wrong, 1 to know of")
    assert lines[6] == f"WRONG    two            {cause}; reinstall electra_composer and its dependencies"
