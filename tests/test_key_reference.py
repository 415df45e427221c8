"""The reference of the keys, and `--help` of every program, which imports no library that takes seconds."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
from complete_config import SCHEMAS
from tiny import ROOT

from electra_composer.errors import UserError
from electra_composer.key_reference import NO_VALUE, Entry, comments, entries, help_text, written
from electra_composer.ranges import keys

HEAVY = {"torch", "composer", "transformers", "streaming", "datasets", "numpy", "pandas", "pyarrow"}
OF_FILES = ["predict", "glue_report", "export", "preview", "score", "quickstart", "report", "push"]


@dataclass
class Base:
    """A base."""

    # in two lines,
    # above
    first: int = 1

    # a title that belongs to no field

    second: list[int] = field(default_factory=lambda: [1])  # beside the last line
    # above it
    third: str = "#"  # and beside
    fourth: str = "# no comment"


@dataclass
class Derived(Base):
    """A schema.

    And more of it.
    """

    first: int = 2  # of the derived
    inner: Base | None = None  # null: none


def test_comments_are_those_above_and_beside_a_field() -> None:
    base = {"second": "beside the last line", "third": "above it; and beside", "fourth": ""}
    assert comments(Base) == {**base, "first": "in two lines, above"}
    assert comments(Derived) == {**base, "first": "of the derived", "inner": "null: none"}


def test_entries_of_a_schema() -> None:
    found = {entry.path: entry for entry in entries(Derived)}
    assert list(found)[:5] == ["first", "second", "third", "fourth", "inner"]
    assert (found["first"].default, found["second"].default, found["inner"].default) == (2, [1], None)
    assert found["inner"].meaning == "A base. null: none"
    assert found["inner"].section is Base
    assert found["inner.first"].meaning == "in two lines, above"


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_key_has_a_meaning_and_a_default_or_is_required(schema: type) -> None:
    """A key without a comment beside or above its field fails here."""
    found = list(entries(schema))
    assert not [entry.path for entry in found if not entry.meaning]
    ranged = {key.path.replace("[]", "") for key in keys(schema)}
    names = {entry.path for entry in found}
    assert {name.removesuffix(".<name>") for name in ranged} <= names
    assert len(names) == len(found)


def test_valid_values_and_defaults_as_yaml() -> None:
    found = {entry.path: entry for entry in entries(SCHEMAS["pretrain"])}
    assert found["optimizer.betas"].expected() == "a list of 2 values, each a number in [0, 1)"
    assert found["optimizer.lr"].default is NO_VALUE
    assert found["optimizer"].default is NO_VALUE
    assert found["trainer.fsdp"].default is None
    values: list[Any] = [[0.9, 0.999], None, True, "auto", {}, 1e-6]
    assert [written(value) for value in values] == ["[0.9, 0.999]", "null", "true", "auto", "{}", "1e-06"]
    assert isinstance(found["data.streams.<name>.repeat"], Entry)


def test_help_of_a_part() -> None:
    schema = SCHEMAS["pretrain"]
    assert help_text(schema, "optimizer.lr").splitlines() == [
        "  optimizer.lr (required)                 a number in (0, 10]",
        "      peak learning rate",
    ]
    section = help_text(schema, "optimizer")
    assert section.startswith("\noptimizer: AdamW as ELECTRA uses it.\n  optimizer.name=adamw ")
    assert "schedule" not in section
    assert set(section.splitlines()) <= set(help_text(schema).splitlines())


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("optimzer", "did you mean optimizer"),
        ("optimizer.lrr", r"did you mean optimizer\.lr\?"),
        ("mask_prob", r"did you mean objective\.mask_prob\?"),
        ("lr", r"did you mean optimizer\.lr or task_settings\.<name>\.lr\?"),
    ],
)
def test_a_misspelt_part_gets_the_nearest(part: str, message: str) -> None:
    schema = SCHEMAS["glue" if part == "lr" else "pretrain"]
    with pytest.raises(UserError, match=rf"^--help {part}: no such key or section; {message}"):
        help_text(schema, part)


def help_of(program: str, *arguments: str) -> tuple[str, str, int]:
    """Run a program, and return its output, its errors and its status; it must import no heavy library."""
    command = [sys.executable, "-X", "importtime", str(ROOT / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    imports = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "electra_composer.errors" in imports
    assert not imports & HEAVY
    return done.stdout, "\n".join(line for line in lines if not line.startswith("import time:")), done.returncode


@pytest.mark.parametrize("name", SCHEMAS)
def test_help_of_a_program_with_keys(name: str) -> None:
    output, errors, status = help_of(f"electra_composer/{name}.py", "--help")
    assert (errors, status) == ("", 0)
    assert output.startswith("usage: ")
    for entry in entries(SCHEMAS[name]):
        assert f"\n  {entry.path}" in output or f"\n{entry.path}" in output


def test_help_after_a_file_and_with_a_wrong_part() -> None:
    output, errors, status = help_of("electra_composer/pretrain.py", "yamls/small.yaml", "--help", "optimizer.lr")
    assert (output.split()[0], errors, status) == ("optimizer.lr", "", 0)
    output, errors, status = help_of("electra_composer/finetune.py", "--help=trainr")
    assert (output, status) == ("", 2)
    assert errors == "error: --help trainr: no such key or section; did you mean trainer?"


@pytest.mark.parametrize("program", [*(f"electra_composer/{name}.py" for name in OF_FILES), "data_prep/convert_owt.py"])
def test_help_of_a_program_with_options(program: str) -> None:
    output, errors, status = help_of(program, "--help")
    assert (errors, status) == ("", 0)
    assert output.startswith("usage: ")
    assert "--help" in output


def test_a_wrong_option_is_refused_as_fast() -> None:
    output, errors, status = help_of("electra_composer/export.py", "run")
    assert (output, status) == ("", 2)
    assert errors == "error: the following arguments are required: folder; see --help"
