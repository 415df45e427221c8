"""Old libraries are refused with the fix, untested ones cause one warning per run, tested ones none."""

from __future__ import annotations

import importlib.metadata
import logging
import re

import pytest
import yaml
from tiny import ROOT

import electra_composer
from electra_composer.errors import UserError
from electra_composer.training.tracking import PACKAGES
from electra_composer.versions import LIBRARIES, check_versions

TESTED = {"mosaicml": "0.32.1", "mosaicml-streaming": "0.13.0", "torch": "2.7.0", "transformers": "4.57.6"}


@pytest.fixture
def installed(monkeypatch):
    """Installed versions, by package; the tested ones unless a test changes them."""
    versions = dict(TESTED)
    monkeypatch.delenv("RANK", raising=False)

    def version(package):
        if versions[package] is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return versions


def test_the_tested_versions_pass_in_silence(installed, caplog):
    check_versions()
    installed |= {"mosaicml": "0.32.1+cpu", "torch": "2.7.0+cu126"}
    check_versions()
    assert not caplog.records


@pytest.mark.parametrize(
    ("package", "version", "reason"),
    [
        ("mosaicml", "0.31.0", "Composer 0.31.0 is too old: it lacks FSDP2Config"),
        ("mosaicml", "0.4.0", "Composer 0.4.0 is too old"),
        ("mosaicml-streaming", "0.9.1", "Streaming 0.9.1 is too old: it lacks streaming.base"),
        ("torch", "2.6.0+cpu", "PyTorch 2.6.0+cpu is too old; expected at least 2.7.0"),
        ("transformers", "4.56.2", "Transformers 4.56.2 is too old; expected at least 4.57.0"),
    ],
)
def test_versions_known_not_to_work_are_refused_with_the_fix(installed, package, version, reason):
    installed[package] = version
    with pytest.raises(UserError) as error:
        check_versions()
    assert str(error.value).startswith(reason)
    assert str(error.value).endswith(f"pip install '{package}=={TESTED[package]}'")


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("mosaicml", "0.32.0"),
        ("mosaicml", "0.33.0.dev0"),
        ("mosaicml-streaming", "0.12.0"),
        ("mosaicml-streaming", "1.0"),
        ("torch", "2.7.1"),
        ("torch", "2.13.0+cu130"),
        ("transformers", "4.57.0"),
    ],
)
def test_untested_versions_are_warned_of_in_one_line(installed, caplog, package, version):
    installed[package] = version
    with caplog.at_level(logging.WARNING):
        check_versions()
    (record,) = caplog.records
    assert f"{version} is untested" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_only_rank_0_warns(installed, caplog, monkeypatch):
    installed["torch"] = "2.8.0"
    for rank, warnings in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        check_versions()
        assert len(caplog.records) == warnings


def test_several_versions_may_be_tested(installed, caplog, monkeypatch):
    monkeypatch.setitem(LIBRARIES, "torch", LIBRARIES["torch"]._replace(tested=("2.7.0", "2.8.0")))
    for version in ("2.7.0", "2.8.0"):
        installed["torch"] = version
        check_versions()
    assert not caplog.records
    installed["torch"] = "2.9.0"
    check_versions()
    assert "PyTorch 2.9.0 is untested (tested: 2.7.0, 2.8.0)" in caplog.text


def test_a_missing_library_is_named(installed):
    installed["mosaicml-streaming"] = None
    with pytest.raises(UserError, match="mosaicml-streaming"):
        check_versions()


def test_tested_is_what_the_constraints_pin():
    constraints = (ROOT / "constraints.txt").read_text()
    for package, library in LIBRARIES.items():
        pins = re.findall(rf"^{package}==(\S+)$", constraints, re.MULTILINE)
        assert len(pins) == 1
        assert pins[0] in library.tested


def pyproject():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_the_same_everywhere():
    """It is set in the package; pyproject.toml takes it from there, and CITATION.cff repeats it."""
    project = pyproject()
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "electra_composer.__version__"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == electra_composer.__version__
    assert citation["license"] == "Apache-2.0"
    assert [author["name"] for author in citation["authors"]] == [
        author["name"] for author in project["project"]["authors"]
    ]


def test_each_tracker_has_an_extra():
    extras = pyproject()["project"]["optional-dependencies"]
    for name, package in PACKAGES.items():
        assert extras[name][0].startswith(package)
