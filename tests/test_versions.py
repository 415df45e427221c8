"""Old Composer and Streaming are refused with the fix, untested ones warned of, the tested ones pass in silence."""

from __future__ import annotations

import importlib.metadata
import logging

import pytest
from tiny import ROOT

from electra_composer.errors import UserError
from electra_composer.versions import FIX, LIBRARIES, check_versions

TESTED = {"mosaicml": "0.32.1", "mosaicml-streaming": "0.13.0"}


@pytest.fixture
def installed(monkeypatch):
    versions = dict(TESTED)

    def version(package):
        if versions[package] is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return versions


def test_the_tested_versions_pass_in_silence(installed, caplog):
    check_versions()
    installed["mosaicml"] = "0.32.1+cpu"
    check_versions()
    assert not caplog.records


@pytest.mark.parametrize(
    ("package", "version", "reason"),
    [
        ("mosaicml", "0.31.0", "Composer 0.31.0 is known not to work: it lacks FSDP2Config"),
        ("mosaicml", "0.4.0", "Composer 0.4.0 is known not to work"),
        ("mosaicml-streaming", "0.9.1", "Streaming 0.9.1 is known not to work: it lacks streaming.base"),
    ],
)
def test_versions_known_not_to_work_are_refused_with_the_fix(installed, package, version, reason):
    installed[package] = version
    with pytest.raises(UserError) as error:
        check_versions()
    assert str(error.value).startswith(reason)
    assert FIX in str(error.value)


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("mosaicml", "0.32.0"),
        ("mosaicml", "0.33.0.dev0"),
        ("mosaicml-streaming", "0.12.0"),
        ("mosaicml-streaming", "1.0"),
    ],
)
def test_untested_versions_are_warned_of_in_one_line(installed, caplog, package, version):
    installed[package] = version
    with caplog.at_level(logging.WARNING):
        check_versions()
    (record,) = caplog.records
    assert f"{version} is untested" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_missing_library_is_named(installed):
    installed["mosaicml-streaming"] = None
    with pytest.raises(UserError, match="mosaicml-streaming"):
        check_versions()


def test_tested_is_what_the_constraints_pin():
    constraints = (ROOT / "constraints.txt").read_text()
    for package, library in LIBRARIES.items():
        assert f"\n{package}=={library.tested}\n" in constraints
