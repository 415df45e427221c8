"""What the pages in docs/ say can be typed: scripts and options that are there, configurations that load."""

from __future__ import annotations

import importlib.util
import re
import shlex

import pytest
from composer.cli.launcher import _get_parser
from tiny import ROOT

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config

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
    if program == "composer":
        _get_parser().parse_args([script, *arguments])  # options of the launcher come before the script
    else:
        assert (ROOT / script).is_file()
    if script == "data_prep/convert_owt.py":
        # files that the page asks for are not here
        parse_conversion([word for word in arguments if word != "--mixture" and not word.endswith(".yaml")])
    launched = shlex.split(command, comments=True)[1:]
    if "electra_composer/pretrain.py" in launched:
        yaml, *overrides = launched[launched.index("electra_composer/pretrain.py") + 1 :]
        path = ROOT / ("yamls/base.yaml" if yaml == "my.yaml" else yaml)  # which stands for the reader's own
        load_config(str(path), overrides, PretrainConfig)


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_are_there(page):
    file = None
    for name, function in re.findall(r"`(?:tests/)?((?:\w+/)*test_\w+\.py)?(?:::)?(test_\w+)?`", PAGES[page]):
        file = ROOT / "tests" / name if name else file
        if name:
            assert file.is_file(), name
        if function:
            assert f"def {function}(" in file.read_text(encoding="utf-8"), f"{file.name}::{function}"
