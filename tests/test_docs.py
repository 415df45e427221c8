"""What docs/ says can be typed, and the tests that it names are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from composer.cli.launcher import _get_parser

from electra_composer.config import PretrainConfig, load_config

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
COMMANDS = [
    line.partition("#")[0].strip()
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    for line in block.splitlines()
    if "pretrain.py" in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command: str) -> None:
    """By the launcher, and every `key=value` by the schema; `my.yaml` stands for the reader's own."""
    program, *arguments = shlex.split(command)
    assert program in ("composer", "python")
    script = arguments.index("electra_composer/pretrain.py")
    if program == "composer":
        _get_parser().parse_args(arguments)
    yaml, *overrides = arguments[script + 1 :]
    path = ROOT / "yamls" / "base.yaml" if yaml == "my.yaml" else ROOT / yaml
    load_config(str(path), overrides, PretrainConfig)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_are_there(page: Path) -> None:
    file = None
    for name, function in re.findall(r"`(?:tests/)?(test_\w+\.py)?(?:::)?(test_\w+)?`", page.read_text("utf-8")):
        file = ROOT / "tests" / name if name else file
        if name:
            assert file is not None
            assert file.is_file(), name
        if function:
            assert file is not None
            assert f"def {function}(" in file.read_text(encoding="utf-8"), f"{file.name}::{function}"


def test_there_are_commands_and_pages() -> None:
    assert len(PAGES) >= 1
    assert len(COMMANDS) >= 5
