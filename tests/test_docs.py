"""What the pages in docs/ say can be typed: scripts and options that are there, configurations that load."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from electra_composer.config import PretrainConfig, load_config

ROOT = Path(__file__).parents[1]
PAGES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}


def blocks(language):
    return [block for text in PAGES.values() for block in re.findall(rf"```{language}\n(.*?)```", text, re.S)]


def commands():
    for block in blocks("bash"):
        without_files = re.sub(r"<<'EOT'\n.*?\nEOT", "", block, flags=re.S).replace("\\\n", " ")
        yield from (line for line in without_files.splitlines() if line.strip() and "cat >" not in line)


def parse_conversion(arguments):
    spec = importlib.util.spec_from_file_location("convert_owt", ROOT / "data_prep/convert_owt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.parse_arguments(arguments)


@pytest.mark.parametrize("command", commands())
def test_commands_name_what_is_there(command):
    program, script, *arguments = shlex.split(command, comments=True)
    assert program in ("python", "composer", "pip")
    if program == "pip":
        return
    if script == "-m":
        assert importlib.util.find_spec(arguments[0]) is not None
        return
    assert (ROOT / script).is_file()
    if script == "data_prep/convert_owt.py":
        # files that the page asks for are not here
        parse_conversion([word for word in arguments if word != "--mixture" and not word.endswith(".yaml")])
    if script == "electra_composer/pretrain.py":
        load_config(str(ROOT / arguments[0]), arguments[1:], PretrainConfig)


@pytest.mark.parametrize("program", blocks("python"))
def test_programs_compile(program):
    compile(program, "docs", "exec")


@pytest.mark.parametrize("yaml", [block for block in blocks("yaml") if block.startswith("data:")])
def test_yaml_is_configuration(yaml, tiny_yaml):
    text = re.sub(r"^data: .*\n", "", tiny_yaml.read_text(), flags=re.M)
    tiny_yaml.write_text(text + yaml)
    load_config(str(tiny_yaml), [], PretrainConfig)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", PAGES[page]):
        assert (page.parent / target).exists(), target
